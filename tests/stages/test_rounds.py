"""Whole runs of the recipes for few labels: DHO, rounds of PCoreSet, adapted teachers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdrun.catalogue import open_catalogue
from kdrun.deployment import evaluate_run
from kdrun.errors import ConfigErrors, UserError
from kdrun.identity import run_directory
from kdrun.validation import check
from tests.models.test_vision_language import tiny_clip
from tests.tiny import composed, identical, run

FAST = ("trainer=cpu", "trainer.progress=off", "student.hidden=[16]", "dataset.steps=4")
DHO = ("method=dho", "teacher=two_tower", "student=mlp_small", *FAST, "training=dho_digits")
ACTIVE = ("method=pcoreset", "teacher=two_tower", "student=mlp_small", *FAST)
ACTIVE += ("training=pcoreset_digits", "method.queries=5")
SHORT = ("training.epochs=2", "training.scheduler.warmup_epochs=0", "training.teacher.epochs=5")
SHORT += ("teacher.allow_chance=true",)


def test_dho_keeps_the_mixture_of_each_epoch(tmp_path: Path) -> None:
    result, directory = run(tmp_path, *DHO, *SHORT)
    assert set(result["networks"]) == {"teacher", "alone", "distilled"}
    for name in ("student", "student_best"):
        weights = load_file(directory / f"{name}.safetensors")
        assert {"classifier.alpha", "classifier.beta"} <= set(weights)
        assert 0 <= weights["classifier.alpha"] <= 1
    assert result["networks"]["distilled"]["parameters"] == (
        result["networks"]["alone"]["parameters"] + 16 * 10 + 10
    )


def test_labelled_and_unlabelled_in_one_batch(tmp_path: Path) -> None:
    """Without batch normalisation it makes no difference."""
    apart, _ = run(tmp_path, *DHO, *SHORT)
    together, _ = run(tmp_path, *DHO, *SHORT, "method.joint_pass=true")
    one, other = (r["networks"]["distilled"]["test_last"]["loss"] for r in (apart, together))
    assert one == pytest.approx(other, rel=1e-3)


def facts(directory: Path, number: int) -> dict:
    return json.loads((directory / f"round_{number}" / "round.json").read_text())


def test_rounds(tmp_path: Path) -> None:
    result, directory = run(tmp_path, *ACTIVE, *SHORT, "method.rounds=2")
    told = [facts(directory, number) for number in range(3)]
    assert [len(fact["labelled"]) for fact in told] == [10, 15, 20]
    assert told[2]["selected"] == []
    for now, later in zip(told, told[1:], strict=False):
        assert sorted(now["labelled"] + now["selected"]) == sorted(later["labelled"])
        assert len(set(now["selected"])) == 5 and not set(now["selected"]) & set(now["labelled"])
        radii = torch.tensor(now["radii"])
        assert (radii.diff() <= 0).all() and (radii >= 0).all()
    pool = load_file(directory / "round_0" / "pool.safetensors")
    assert set(told[0]["selected"]) <= set(pool["index"].tolist())
    assert not set(pool["index"].tolist()) & set(told[0]["labelled"])
    assert [entry["labelled"] for entry in result["rounds"]] == [10, 15, 20]
    assert result["networks"] == told[2]["networks"]
    last = load_file(directory / "round_2" / "student.safetensors")
    assert identical(load_file(directory / "student.safetensors"), last)
    again, _ = run(tmp_path, *ACTIVE, *SHORT, "method.rounds=2")
    assert again["rounds"] == result["rounds"]


def test_the_same_labels_and_seed_give_the_same_student(tmp_path: Path) -> None:
    """Round 0 does not depend on how labels are bought later, and no round on the one before."""
    found = []
    for strategy in ("random", "uncertainty"):
        _, directory = run(
            tmp_path, *ACTIVE, *SHORT, "method.rounds=1", f"method.strategy={strategy}"
        )
        found.append(load_file(directory / "round_0" / "student.safetensors"))
        found.append(facts(directory, 0)["selected"])
    assert identical(found[0], found[2]) and found[1] != found[3]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["coreset", "badge", "classbalanced"])
def test_every_strategy_in_a_run(tmp_path: Path, strategy: str) -> None:
    words = ("method.rounds=1", f"method.strategy={strategy}")
    _, directory = run(tmp_path, *ACTIVE, *SHORT, *words)
    assert len(set(facts(directory, 0)["selected"])) == 5


def eval_again(directory: Path) -> dict:
    """What ``kdrun eval`` finds, by network."""
    evaluate_run(directory, [], open_catalogue())
    (path,) = directory.glob("eval-*.json")
    return json.loads(path.read_text())["networks"]


@pytest.mark.slow
def test_clap_in_rounds(tmp_path: Path) -> None:
    words = (
        "recipe=pcoreset_clap",
        "method.rounds=1",
        "recipe.stages.rounds.stages.clap.passes=64",
    )
    for lag in (0, 1):
        result, directory = run(
            tmp_path, *ACTIVE, *SHORT, *words, f"recipe.stages.rounds.stages.clap.lag={lag}"
        )
        assert eval_again(directory)["teacher"]["test"] == result["networks"]["teacher"]["test"]
        for number in (0, 1):
            clap = load_file(directory / f"round_{number}" / "clap" / "network.safetensors")
            assert not torch.equal(clap["prototypes"], clap["anchors"])
            assert (clap["weights"] >= 0).all() and (clap["weights"] <= 1).all()


@pytest.mark.slow
def test_tip_adapter_as_teacher(tmp_path: Path) -> None:
    words = ("recipe=dho_tip", "dataset.shots=8", "training.teacher.epochs=20")
    changed = [word for word in SHORT if not word.startswith("training.teacher.epochs")]
    adapted, directory = run(tmp_path, *DHO, *changed, *words)
    plain, _ = run(tmp_path, *DHO, *changed, "dataset.shots=8", "training.teacher.epochs=20")
    tip = load_file(directory / "adapter" / "network.safetensors")
    assert tip["keys"].shape == (80, 32) and tip["values"].sum() == 80
    before, after = (r["networks"]["teacher"]["test"]["accuracy"] for r in (plain, adapted))
    assert after > before
    assert eval_again(directory)["teacher"] == {
        key: value for key, value in adapted["networks"]["teacher"].items() if key != "training"
    }


# -- interruptions ---------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from kdrun import cli
from kdrun.distiller import Distiller
from kdrun.stages.rounds import Rounds

where, words = sys.argv[1], sys.argv[2:]
step, report, seen = Distiller._step, Rounds._report, []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(self, batch):
    if "classifier.alpha" in self.networks["student"].state_dict():
        seen.append(1)
    step(self, batch)
    if where == "within" and len(seen) == 14:  # the second epoch of round 1
        die()

def reported(self, context, facts, number, rounds):
    report(self, context, facts, number, rounds)
    if where == "between" and number == 1:
        die()

Distiller._step, Rounds._report = counted, reported
sys.exit(cli.run(words))
"""


@pytest.mark.slow
def test_killed_within_a_round_and_between_rounds(tmp_path: Path) -> None:
    words = [*ACTIVE, *SHORT, "method.rounds=2"]
    expected, whole = run(tmp_path / "whole", *words)
    command = [*words, f"output_dir={tmp_path / 'killed'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for where, left in (("within", 1), ("between", 2)):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, where, *command], env=environment, timeout=120
        )
        assert done.returncode == -signal.SIGKILL
        folder = next((tmp_path / "killed" / "digits_active").rglob("seed0"))
        finished = [n for n in range(3) if (folder / f"round_{n}" / "artefact.json").exists()]
        assert len(finished) == left
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "never", *command], env=environment, timeout=120
    )
    assert done.returncode == 0
    for number in range(3):
        ours, theirs = facts(folder, number), facts(whole, number)
        assert (ours["labelled"], ours["selected"]) == (theirs["labelled"], theirs["selected"])
        weights = [
            load_file(d / f"round_{number}" / "student.safetensors") for d in (folder, whole)
        ]
        assert identical(*weights)
    result = json.loads((folder / "result.json").read_text())
    for ours, theirs in zip(result["rounds"], expected["rounds"], strict=True):
        one, other = (r["networks"]["distilled"]["test_last"] for r in (ours, theirs))
        assert one == other


# -- full scale ------------------------------------------------------------------------------------


def test_the_papers_settings_compose() -> None:
    words = ("method=dho", "dataset=imagenet_percent", "student=clip", "teacher=clip")
    words += ("student.name=openai/clip-vit-base-patch16", "teacher.name=ViT-H-14-378-quickgelu")
    words += ("teacher.library=open_clip", "teacher.tag=dfn5b", "teacher.average=norm_mean")
    words += ("student.head=linear", "student.average=raw_mean", "method.combination=sum")
    words += ("method.head_init=classifier", "method.distilled_head=cosine")
    words += ("method.mixture=fixed", "method.beta=0.5", "method.joint_pass=true")
    config = composed(*words).values
    training, data = config["training"], config["dataset"]
    assert (training["epochs"], training["batch_size"]) == (32, 256)
    assert training["optimizer"]["lr"] == 5e-5 and training["optimizer"]["weight_decay"] == 0.05
    assert training["scheduler"]["name"] == "cosine"
    assert (data["percent"], data["shots"], data["label_seed"]) == (1.0, None, 13)
    assert data["pairs"] == "cycle_labelled" and len(data["templates"]) == 7
    small = composed("method=dho", "dataset=few_shot_folder", "dataset.data.name=x").values
    assert small["training"]["epochs"] == 200 and small["training"]["batch_size"] == 64
    assert (
        small["training"]["scheduler"] | {"name": "linear", "warmup_epochs": 20.0}
        == (small["training"]["scheduler"])
    )
    assert small["dataset"]["data"]["crop_scale"] == [0.5, 1.0]
    active = composed(
        "method=pcoreset",
        "dataset=few_shot_folder",
        "dataset.data.name=x",
        "dataset.pairs=with_replacement",
    ).values
    assert (active["method"]["rounds"], active["method"]["queries"]) == (15, None)
    assert active["training"]["epochs"] == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        (
            *("method=dho", "student=clip", "student.head=linear", "student.average=raw_mean"),
            *("method.combination=sum", "method.head_init=classifier"),
            *("method.distilled_head=cosine", "method.joint_pass=true", "method.mixture=fixed"),
        ),
        ("method=dho", "student=timm/resnet18", "dataset.data.image_size=32"),
        ("method=pcoreset", "student=timm/resnet18", "dataset.data.image_size=32"),
        (
            *("method=pcoreset", "recipe=pcoreset_clap", "student=timm/resnet18"),
            "dataset.data.image_size=32",
        ),
    ],
    ids=["clip", "resnet18", "rounds", "rounds with CLAP"],
)
def test_one_step_on_small_networks_of_the_same_classes(tmp_path: Path, words: tuple) -> None:
    folder = tiny_clip(tmp_path / "clip")
    names = [f"{role}.name={folder}" for role in ("teacher", "student") if f"{role}=clip" in words]
    config = composed(
        *("teacher=clip", f"teacher.name={folder}", "trainer=cpu"),
        *("training=smoke", "dry=true", "trainer.progress=off", "teacher.allow_chance=true"),
        *words,
        *names,
        f"output_dir={tmp_path}",
    )
    from kdrun.experiment import run_experiment

    assert any(line.startswith("teacher") for line in check(config.values, config.names))
    result = run_experiment(config.values, names=config.names, overrides=[], command=[])
    alone = {"alone"} if "method=dho" in words else set()
    assert set(result["networks"]) == {"teacher", "distilled"} | alone


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("method=dho", "dataset.shots=500"), "dataset.shots=500: class"),
        (("method=dho", "dataset=digits"), "learns from samples without labels too"),
        (("method=pcoreset", "method.rounds=100"), "asks for 1000 labels in all, but only 690"),
        (("method=kd", "recipe=pcoreset", "dataset=digits_active"), "chooses no samples"),
        (("method=pcoreset", "dataset=digits"), "the data set has them all"),
        (("method=dho", "recipe=dho_tip", "dataset=digits"), "adapts the teacher to few labels"),
        (("method=dho", "teacher=clip", "teacher.name=/no/folder"), "no such folder"),
        (("method=dho", "dataset.names=[a,b]"), "2 names for 10 classes"),
        (("method=dho", "teacher.cache=logits"), "whose outputs are not recorded"),
    ],
)
def test_one_line_before_anything_is_trained(words: tuple, said: str, tmp_path: Path) -> None:
    config = composed(*words, f"output_dir={tmp_path}", "trainer=cpu")
    with pytest.raises((ConfigErrors, UserError)) as refused:
        check(config.values, config.names)
    lines = getattr(refused.value, "problems", [str(refused.value)])
    assert any(said in line for line in lines), lines
    assert all("\n" not in line for line in lines)
    assert not run_directory(config.values, config.names).exists()
