"""Teachers and references: whose weights they are, and what names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdrun.checkpoints import save_weights, saved_for
from kdrun.errors import UserError
from kdrun.models.mlp import MLP
from kdrun.stages.train import (
    WEIGHTS,
    TrainAlone,
    TrainTeacher,
    existing_file,
    initial_student,
    is_trained_here,
    load_network,
)
from kdrun.stages.training import training_settings
from tests.tiny import identical, state_of


def teacher_key(make_context, *words: str) -> dict:
    return TrainTeacher().key(make_context(*words))


def student_key(make_context, *words: str) -> dict:
    return TrainAlone().key(make_context(*words))


@pytest.mark.parametrize(
    "word",
    [
        "seed=1", "method=dkd", "student=mlp", "teacher.mode=batch_stats", "teacher.weights=best",
        "logger=tensorboard", "trainer.num_threads=1", "teacher.allow_chance=true",
    ],
)  # fmt: skip
def test_what_does_not_make_another_teacher(make_context, word: str) -> None:
    assert teacher_key(make_context) == teacher_key(make_context, word)


@pytest.mark.parametrize(
    "word",
    [
        "teacher.seed=1", "teacher.hidden=[8]", "training.epochs=3", "training.teacher.epochs=3",
        "training.ema=0.9", "dataset.val_fraction=0.2", "dataset.augmentation.crop_padding=1",
        "protocol=paper", "trainer.precision=bf16", "trainer.accumulate=2",
        "training.label_smoothing=0.1", "training.optimizer.lr=0.2",
    ],
)  # fmt: skip
def test_what_makes_another_teacher(make_context, word: str) -> None:
    assert teacher_key(make_context) != teacher_key(make_context, word)


@pytest.mark.parametrize("word", ["method=dkd", "teacher=resnet8", "training.teacher.epochs=3"])
def test_what_does_not_make_another_student_alone(make_context, word: str) -> None:
    assert student_key(make_context) == student_key(make_context, word)


@pytest.mark.parametrize("word", ["seed=1", "student.widths=[4]", "training.epochs=3"])
def test_what_makes_another_student_alone(make_context, word: str) -> None:
    assert student_key(make_context) != student_key(make_context, word)


def test_given_weights_keep_what_they_say_of_their_data(make_context, tmp_path: Path) -> None:
    network = MLP(num_classes=10, input_shape=(1, 8, 8))
    for number, said in enumerate(({}, {"normalisation": "another"})):
        path = tmp_path / f"{number}.safetensors"
        save_weights(network, path, said)
        context = make_context(f"teacher.checkpoint={path}", "teacher.allow_other_data=true")
        TrainTeacher().run(context, "teacher")
        kept = context.artefacts["teacher"].directory
        assert all(saved_for(kept / file) == said for file in WEIGHTS.values())


def test_given_weights_are_named_by_their_content(make_context, tmp_path: Path) -> None:
    keys = []
    for number, name in enumerate(("a.safetensors", "b.safetensors", "a.safetensors")):
        torch.manual_seed(number)
        save_weights(MLP(num_classes=10, input_shape=(1, 8, 8)), tmp_path / name)
        keys.append(teacher_key(make_context, f"teacher.checkpoint={tmp_path / name}"))
    assert keys[0] != keys[2], "the file has changed"
    word = f"teacher.checkpoint={tmp_path / 'a.safetensors'}"
    assert teacher_key(make_context, word, "training.epochs=9") == keys[2], "it is not trained"
    words = (word, "teacher.finetune=true")
    finetuned = teacher_key(make_context, *words)
    assert finetuned != keys[2]
    assert finetuned != teacher_key(make_context, *words, "training.epochs=9")


@pytest.mark.parametrize(
    ("node", "trained"),
    [
        ({"checkpoint": None}, True),
        ({"checkpoint": "x.pt", "finetune": False}, False),
        ({"checkpoint": "x.pt", "finetune": True}, True),
        ({"checkpoint": None, "pretrained": True, "finetune": False}, False),
        ({"checkpoint": None, "pretrained": True, "finetune": True}, True),
    ],
)
def test_who_trains_the_teacher(node, trained: bool) -> None:
    assert is_trained_here(node) is trained


def test_methods_without_a_frozen_teacher_need_none(make_context) -> None:
    assert TrainTeacher().wanted(make_context("method=kd"))
    assert not TrainTeacher().wanted(make_context("method=dml"))


def test_the_initial_student_depends_on_the_seed_alone(make_context) -> None:
    def initial(*words: str) -> dict:
        return state_of(initial_student(make_context(*words)))

    assert identical(initial(), initial("method=dkd", "teacher=resnet8"))
    assert not identical(initial(), initial("seed=1"))


def test_the_last_and_the_best_teacher(make_context) -> None:
    context = make_context("training.epochs=3", "training.optimizer.lr=0.3")
    TrainTeacher().run(context, "teacher")
    last = load_network(context, "teacher")
    assert not last.training
    context.config = {
        **context.config,
        "teacher": {**context.config["teacher"], "weights": "best"},
    }
    best = load_network(context, "teacher")
    told = context.artefacts["teacher"].path("training.json").read_text()
    same = '"best_epoch": 3' in told
    assert identical(last.state_dict(), best.state_dict()) is same


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.checkpoint=/nowhere/x\.pt: no such file"):
        existing_file("/nowhere/x.pt", "teacher.checkpoint")


def test_settings_of_the_teacher_replace_those_of_all(make_context) -> None:
    config = make_context("training.teacher.epochs=7").config
    student, teacher = (training_settings(config, role) for role in ("student", "teacher"))
    assert (student["epochs"], teacher["epochs"]) == (1, 7)
    assert teacher["optimizer"] == student["optimizer"]
    assert "teacher" not in student
