"""``kdrun validate``: everything fitted together before anything runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from kdrun import cli, validation
from kdrun.assembly import Assembly
from kdrun.build import allowing
from kdrun.checkpoints import save_weights
from kdrun.errors import ConfigErrors
from kdrun.methods.kd import KD
from kdrun.models.mlp import MLP
from kdrun.validation import activation_bytes, check, optimizer_states
from tests.tiny import composed, digits, run, small_cnn, task, tiny_config


def lines_of(root: Path, *words: str) -> list[str]:
    config = tiny_config(root, *words)
    with allowing(config.values["allow_packages"]):
        return check(config.values, config.names)


def facts(root: Path, *words: str) -> dict[str, str]:
    lines = [line.partition(" ") for line in lines_of(root, *words)]
    return {title: text.strip() for title, _, text in lines}


def problems(root: Path, *words: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        facts(root, *words)
    return caught.value.problems


def test_what_a_run_will_be(tmp_path: Path) -> None:
    told = facts(tmp_path)
    assert told["data"] == (
        "digits, 1,102 train, 195 validation, 500 test samples of 1x8x8, 10 classes"
    )
    assert told["student"] == "small_cnn, 24,058 parameters, trained here"
    assert told["teacher"] == "mlp, 85,002 parameters, trained here"
    assert told["steps"] == "18 an epoch, 18 in all, batches of 64"
    assert told["memory"].startswith("about ") and "besides data and Python" in told["memory"]
    assert told["run"].endswith("seed0 (not finished)")
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_finished_run_is_recognised(tmp_path: Path) -> None:
    run(tmp_path)
    assert facts(tmp_path)["run"].endswith("(finished)")


def test_what_a_method_adds(tmp_path: Path) -> None:
    told = facts(tmp_path, "method=fitnet", "teacher=small_cnn", "teacher.widths=[32,32,32]")
    assert "FitNet adds " in told["method"]
    assert "method" not in facts(tmp_path)


def test_weights_are_read(tmp_path: Path) -> None:
    save_weights(MLP(num_classes=10, input_shape=(1, 8, 8)), tmp_path / "teacher.safetensors")
    save_weights(MLP(num_classes=7, input_shape=(1, 8, 8)), tmp_path / "start.safetensors")
    told = lines_of(
        tmp_path,
        "student=mlp",
        f"teacher.checkpoint={tmp_path}/teacher.safetensors",
        f"student.init_from={tmp_path}/start.safetensors",
    )
    weights = [line for line in told if line.startswith("weights")]
    assert any("student.init_from: 4 of 6 tensors loaded" in line for line in weights)
    assert any("teacher.checkpoint: 6 of 6 tensors loaded" in line for line in weights)
    assert any(line.startswith("teacher") and "weights of" in line for line in told)


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "training.optimizer.momentum=0",
        "teacher.checkpoint=/nowhere/weights.pt",
        "teacher=timm/resnet_of_nobody",
    )
    assert "Nesterov momentum requires" in found[0]
    assert any("/nowhere/weights.pt: no such file" in line for line in found)
    assert any("no network timm/resnet_of_nobody" in line for line in found)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("student.num_classes=7",), "student gives 7 logits but the data set has 10 classes"),
        (("teacher.checkpoint=/nowhere.pt",), r"teacher\.checkpoint=/nowhere\.pt: no such file"),
        (("student=torch.nn.Identity",), "student gives 8 logits"),
        (("dataset=tabular",), "reads images, but a sample of this data set has shape"),
        (("method=at", "student=mlp"), "AT"),
        (
            ("training.optimizer={_target_:torch.optim.SGD,lr:0.1,nesterov:true}",),
            "Nesterov momentum requires",
        ),
        (("logger=mlflow",), "mlflow is not installed"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(tmp_path: Path, monkeypatch, words, message: str) -> None:
    real = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "mlflow" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ConfigErrors, match=message) as caught:
        lines_of(tmp_path, *words)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (found,) = problems(tmp_path, "trainer=gpu")
    assert found.startswith("trainer: not possible on this machine")


# -- estimates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        ({"_target_": "torch.optim.SGD", "lr": 0.1}, 0),
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, 1),
        ({"_target_": "torch.optim.AdamW", "lr": 0.1}, 2),
        ({"_target_": "torch.optim.Adam", "lr": 0.1, "amsgrad": True}, 3),
    ],
)
def test_numbers_that_an_optimiser_keeps(optimizer, states: int) -> None:
    settings = composed("training=smoke").values["training"] | {"optimizer": optimizer}
    assert optimizer_states(settings) == states


def test_activations_are_what_the_backward_pass_needs() -> None:
    """By hand: a linear layer keeps its input, an in-place ReLU its output."""
    student = MLP(num_classes=10, input_shape=(1, 8, 8), hidden=(32, 16))
    found = activation_bytes(Assembly(KD(), student), task(), digits())
    assert found == 4 * (64 + 32 + 16)


def test_activations_are_the_same_without_numbers() -> None:
    real = activation_bytes(Assembly(KD(), small_cnn(0)), task(), digits())
    with torch.device("meta"):
        network = small_cnn(0)
    assert activation_bytes(Assembly(KD(), network), task(), digits(), "meta") == real
    assert real > 4 * (4 + 8 / 4 + 8 / 16) * 64


def test_networks_too_large_to_build_are_checked_by_shape(tmp_path: Path, monkeypatch) -> None:
    small = facts(tmp_path, "method=rkd")
    built = []
    monkeypatch.setattr(validation, "LARGEST_BUILT", 0)
    real = validation.assemble

    def noting(method, student, teachers, **keywords):
        built.extend(p.device.type for n in (student, *teachers.values()) for p in n.parameters())
        return real(method, student, teachers, **keywords)

    monkeypatch.setattr(validation, "assemble", noting)
    assert facts(tmp_path, "method=rkd") == small
    assert set(built) == {"meta"}
    with pytest.raises(ConfigErrors, match="gives 7 logits"):
        facts(tmp_path, "method=rkd", "student.num_classes=7")


# -- the command -----------------------------------------------------------------------------------


def test_the_command(capsys) -> None:
    assert cli.run(["validate", "student=small_cnn", "teacher=mlp", "training=smoke"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "valid"
    assert cli.run(["validate", "student=small_cnn", "teacher=mlp", "student.num_classes=7"]) == 2
    assert "gives 7 logits" in capsys.readouterr().err


class Computing(nn.Module):
    """Cannot be built without numbers, and need not be."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.scale = float(torch.linspace(0, 1, 3)[1])
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x.flatten(1)) * self.scale


def test_a_network_that_computes_in_its_constructor(tmp_path: Path) -> None:
    told = facts(tmp_path, "student=tests.test_validation.Computing")
    assert "650 parameters" in told["student"]
