"""The recipes of the literature and ours; stages taken out on the command line, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.cli import run as kdrun
from kdrun.config import compose
from kdrun.experiment import run_experiment
from kdrun.overrides import merge
from kdrun.report.summary import summary_table
from kdrun.stages.training import training_settings
from kdrun.table.config import open_table
from tests.tiny import WORDS, composed, run


def test_a_stage_that_nobody_needs_is_left_out(tmp_path: Path) -> None:
    result, directory = run(tmp_path, "method=ls", "recipe.stages.alone=null")
    assert "alone" not in result["artefacts"]
    assert set(result["networks"]) == {"teacher", "distilled"}
    assert (directory / "artefact.json").exists()


def test_a_recipe_without_an_evaluation(tmp_path: Path) -> None:
    result, directory = run(
        tmp_path, "method=ls", "recipe.stages.alone=null", "recipe.stages.evaluate=null"
    )
    assert (result["networks"], result["objective"]) == ({}, None)
    assert (directory / "student.safetensors").exists()
    assert "no stage of this recipe evaluates the networks" in summary_table(result)


@pytest.mark.parametrize(("stage", "method"), [("teacher", "kd"), ("distil", "ls")])
def test_a_stage_that_another_needs_is_one_line(tmp_path: Path, capsys, stage, method) -> None:
    words = [*WORDS, f"output_dir={tmp_path}", "recipe.stages.alone=null"]
    assert kdrun([*words, f"method={method}", f"recipe.stages.{stage}=null"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"the recipe has no stage {stage} before one that needs what it makes; "
        f"do not take recipe.stages.{stage} out\n"
    )


def test_the_same_recipe_is_the_same_run() -> None:
    """A recipe without a stage, and one that it was taken out of, are one experiment."""
    values = composed("recipe.stages.alone=null").values
    assert "alone" not in values["recipe"]["stages"]


# -- the recipes of images -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "rates", "epochs", "batch_size", "milestones", "decay"),
    [
        (["recipe=cifar240"], (0.05, 0.05), 240, 64, [150, 180, 210], 5e-4),
        *(
            (["recipe=cifar240", f"student={name}"], (0.05, 0.01), 240, 64, [150, 180, 210], 5e-4)
            for name in ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")
        ),
        (["recipe=imagenet100"], (0.1, 0.1), 100, 256, [30, 60, 90], 1e-4),
    ],
)
def test_recipes_of_the_literature(words, rates, epochs, batch_size, milestones, decay) -> None:
    config = composed(*words).values
    for role, rate in zip(("teacher", "student"), rates, strict=True):
        settings = training_settings(config, role)
        assert (settings["epochs"], settings["batch_size"]) == (epochs, batch_size)
        assert settings["optimizer"] == {
            "_target_": "torch.optim.SGD",
            "lr": rate,
            "momentum": 0.9,
            "weight_decay": decay,
            "nesterov": False,
        }
        schedule = settings["scheduler"]
        assert (schedule["name"], schedule["gamma"]) == ("multistep", 0.1)
        assert (schedule["milestones"], schedule["warmup_epochs"]) == (milestones, 0)


def test_depthwise_students_of_a_table_learn_at_their_own_rate_from_the_same_teacher() -> None:
    table = open_table("cifar100_cross", open_catalogue())
    configs = {
        column.label: composed(*merge([table.words, column.words])).values
        for column in table.columns
    }
    for label, config in configs.items():
        rate = config["training"]["optimizer"]["lr"]
        assert rate == (0.01 if label.endswith(("SNV1", "SNV2", "MNV2")) else 0.05), label
    first, second = configs["R50-MNV2"], configs["R50-VGG8"]
    assert first["teacher"] == second["teacher"]
    assert training_settings(first, "teacher") == training_settings(second, "teacher")


def test_what_is_typed_wins_over_what_a_student_trains_differently() -> None:
    words = ["recipe=cifar240", "student=mobilenet_v2", "training.optimizer.lr=0.02"]
    assert composed(*words).values["training"]["optimizer"]["lr"] == 0.02
    assert composed("student=mobilenet_v2").values["training"] == composed().values["training"]


def test_students_of_ones_own_training_train_differently_too(tmp_path: Path) -> None:
    (tmp_path / "training_of" / "digits").mkdir(parents=True)
    file = tmp_path / "training_of" / "digits" / "small_cnn.yaml"
    file.write_text("training: {batch_size: 32}\n", encoding="utf-8")
    catalogue = open_catalogue([tmp_path])
    found = {
        student: compose([f"student={student}"], catalogue).values["training"]["batch_size"]
        for student in ("small_cnn", "resnet8")
    }
    assert found == {"small_cnn": 32, "resnet8": 64}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_trial_of_our_fast_recipe(tmp_path: Path, compiled: bool) -> None:
    """Shorter than the rise of its learning rate."""
    words = ["recipe=cifar_fast", "dataset=digits", "teacher=resnet8", "student=resnet8_half"]
    config = composed(*words, "trainer.progress=off", f"output_dir={tmp_path}").values
    trainer, training = config["trainer"], config["training"]
    assert (trainer["precision"], trainer["compile"]) == ("bf16", True)
    assert (training["scheduler"]["name"], training["batch_size"]) == ("onecycle", 512)
    trial = config | {"dry": True, "trainer": trainer | {"accelerator": "cpu", "compile": compiled}}
    result = run_experiment(trial, names=composed(*words).names, overrides=[], command=[])
    assert set(result["networks"]) == {"teacher", "alone", "distilled"}
