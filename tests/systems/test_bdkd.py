"""BD-KD as a system: what its run shows, that it goes on after a kill, and its full scale."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.experiment import run_experiment
from kdrun.validation import check
from tests.systems.killing import metrics_of, run_and_kill, weights
from tests.tiny import run

NETWORKS = ("method=bdkd", "teacher=mlp", "student=mlp_narrow")
RECIPE = (*NETWORKS, "training=digits_constant")
PAPER = ("method=bdkd", "dataset=cifar100", "training=cifar200", "trainer=cpu")


def test_by_itself_it_is_a_run_on_few_digits() -> None:
    config = compose(["method=bdkd"], open_catalogue())
    values = config.values
    assert config.names["dataset"] == "digits_few" and values["dataset"]["per_class"] == 30
    assert values["teacher"]["hidden"] == [256, 256] and values["student"]["hidden"] == [10]
    assert (values["training"]["epochs"], values["training"]["optimizer"]["lr"]) == (60, 0.03)
    typed = compose(["method=bdkd", "dataset=digits", "student=small_cnn"], open_catalogue())
    assert (typed.names["dataset"], typed.names["student"]) == ("digits", "small_cnn")
    assert typed.values["training"]["epochs"] == 8, "a data set brings its own training"


@pytest.mark.slow
def test_what_the_small_run_shows(tmp_path: Path) -> None:
    """Calibration improves, the teacher does not suffer, and the balance moves; over 5 seeds."""
    errors = {"alone": [], "distilled": []}
    teachers = {"balanced": [], "none": []}
    for seed in range(5):
        for divergence, accuracies in teachers.items():
            words = (*RECIPE, f"seed={seed}", f"method.divergence={divergence}")
            result, directory = run(tmp_path, *words)
            accuracies.append(result["networks"]["teacher"]["test"]["accuracy"])
            if divergence == "none":
                continue
            for role, values in errors.items():
                values.append(result["networks"][role]["test_last"]["ece"])
            with (directory / "metrics.csv").open() as file:
                shares = [float(row["student_more_confident"]) for row in csv.DictReader(file)]
            assert max(shares) - min(shares) > 0.2, "it moves"
            assert sum(0 < share < 1 for share in shares) > 30, "it is neither 0 nor 1 throughout"
    assert mean(errors["distilled"]) < mean(errors["alone"])
    assert abs(mean(teachers["balanced"]) - mean(teachers["none"])) < 1


def test_networks_without_divergence_are_those_trained_alone(tmp_path: Path) -> None:
    result, _ = run(tmp_path, *NETWORKS, "method.divergence=none", "training.epochs=2")
    alone, distilled = (result["networks"][role]["test_last"] for role in ("alone", "distilled"))
    assert distilled == alone


def test_the_teacher_is_trained_by_its_own_settings(tmp_path: Path) -> None:
    still = "training.teacher.optimizer={_target_:torch.optim.SGD,lr:1e-12}"
    results = [
        run(tmp_path, *NETWORKS, *words)[0] for words in ((still,), (still, "training.epochs=3"))
    ]
    first, second = (result["networks"]["teacher"]["test"] for result in results)
    assert first["accuracy"] == second["accuracy"] and first["ece"] == pytest.approx(second["ece"])
    students = [result["networks"]["distilled"]["test_last"]["loss"] for result in results]
    assert students[1] < students[0]


# -- going on after a kill -------------------------------------------------------------------------

SHORT = (*NETWORKS, "training.epochs=3")
STEPS_ALONE = 3 * 5


@pytest.mark.slow
@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
@pytest.mark.parametrize(
    ("step", "often"),
    [
        pytest.param(STEPS_ALONE + 8, True, id="in mid-epoch"),
        pytest.param(STEPS_ALONE + 8, False, id="losing an epoch"),
        pytest.param(STEPS_ALONE + 1, False, id="between two phases"),
    ],
)
def test_killed_and_started_again(tmp_path: Path, update: str, step: int, often: bool) -> None:
    words = (*SHORT, f"method.update={update}")
    expected, _ = run(tmp_path / "whole", *words)
    run_and_kill(tmp_path / "killed", words, step=step, often=often)
    found, _ = run(tmp_path / "killed", *words)
    assert metrics_of(found) == metrics_of(expected)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


# -- full scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "epochs", "milestones"),
    [
        (("dataset=cifar100", "training=cifar200"), 200, [60, 120, 160]),
        (("dataset=tiny_imagenet", "training=cifar200"), 200, [60, 120, 160]),
        (("dataset=imagenet",), 100, [30, 60, 90]),
    ],
)
def test_the_papers_recipes(words: tuple[str, ...], epochs: int, milestones: list[int]) -> None:
    networks = ("teacher=resnet56", "student=resnet20")
    training = compose(["method=bdkd", *networks, *words], open_catalogue()).values["training"]
    assert (training["epochs"], training["scheduler"]["milestones"]) == (epochs, milestones)
    assert training["optimizer"]["lr"] == 0.1 and training["optimizer"]["momentum"] == 0.9


def test_a_step_at_full_scale_on_stand_ins(miniature, tmp_path: Path) -> None:
    """The recipe of the paper with smaller networks of the same class, one step of every stage."""
    miniature("uoft-cs/cifar100", columns=("img", "fine_label"))
    words = (*PAPER, "teacher=resnet14", "student=resnet8", "dry=true", f"output_dir={tmp_path}")
    config = compose([*words, "trainer.progress=off"], open_catalogue())
    assert any(line.startswith("student") for line in check(config.values, config.names))
    result = run_experiment(config.values, names=config.names, overrides=[], command=[])
    assert set(result["networks"]) == {"teacher", "alone", "distilled"}
    shares = result["networks"]["distilled"]["training"]["gradient_shares"]
    assert set(shares) == {
        *("supervised", "forward", "reverse", "supervised_teacher", "mutual_teacher")
    }
