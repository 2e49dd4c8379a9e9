"""OFA-KD as a system: what its run shows, that it goes on after a kill, and its full scale."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.experiment import run_experiment
from kdrun.models.small_cnn import SmallCNN
from kdrun.validation import check
from tests.systems.killing import metrics_of, run_and_kill, weights
from tests.tiny import run

EXITS = ("exit1", "exit2", "exit3", "exit4")
TINY_VIT = "teacher.options={patch_size:4,embed_dim:24,depth:2,num_heads:2}"
TINY = (
    *("method=ofa", "dataset=digits_16", "teacher=vit_small_images", TINY_VIT),
    *("student=small_cnn_4", "student.widths=[4,4,8,8]", "teacher.allow_chance=true"),
)
SHORT = (*TINY, "training.epochs=2", "training.batch_size=160")
STEPS = 7
"""Of an epoch: 1,102 images in batches of 160."""


def test_by_itself_it_is_a_run_from_a_transformer_to_a_cnn() -> None:
    config = compose(["method=ofa"], open_catalogue())
    values = config.values
    assert config.names["dataset"] == "digits_16" and values["dataset"]["image_size"] == 16
    assert values["teacher"]["name"] == "vit_tiny_patch16_224"
    assert values["student"]["widths"] == [16, 32, 64, 128]
    assert values["training"]["teacher"]["optimizer"]["_target_"] == "torch.optim.AdamW"


@pytest.mark.slow
def test_what_the_small_run_shows(tmp_path: Path) -> None:
    """Every exit learns, the deeper the sooner, and none ships."""
    words = ("method=ofa", "dataset=digits_16", "teacher=vit_small_images", "student=small_cnn_4")
    result, directory = run(
        tmp_path, *words, TINY_VIT, "training=digits_16", "training.teacher.epochs=8"
    )
    networks = result["networks"]
    accuracies = [networks[name]["test"]["accuracy"] for name in EXITS]
    assert min(accuracies) > 40, "guessing gives 10"
    assert accuracies[-1] > accuracies[0]
    assert networks["distilled"]["test_last"]["accuracy"] > 80
    with (directory / "metrics.csv").open() as file:
        first, *_, last = csv.DictReader(file)
    for name in EXITS:
        assert float(last[f"loss/{name}"]) < 0.95 * float(first[f"loss/{name}"])
    assert float(last["loss/exit4"]) < float(last["loss/exit1"])
    plain = SmallCNN(num_classes=10, in_channels=1, widths=(16, 32, 64, 128))
    assert set(load_file(directory / "student.safetensors")) == set(plain.state_dict())
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert networks["distilled"]["parameters"] == count < networks["exit4"]["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "exits"),
    [
        (("method.stages=[]",), set()),
        (("student=mixer_digits", "student.embed_dim=16", "student.num_blocks=4"), set(EXITS)),
    ],
)
def test_other_arms(tmp_path: Path, words: tuple[str, ...], exits: set[str]) -> None:
    """Logits alone; and a student of tokens that learns from a CNN."""
    teacher = ("teacher=small_cnn", "method.final_grid=2") if exits else ()
    chosen = {word.partition("=")[0]: word for word in (*SHORT, *teacher, *words)}
    if exits:
        del chosen["teacher.options"], chosen["student.widths"]
    result, _ = run(tmp_path, *chosen.values())
    assert set(result["networks"]) == {"teacher", "alone", "distilled"} | exits


# -- going on after a kill -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "often"),
    [
        pytest.param(5 * STEPS + 3, True, id="in mid-epoch"),
        pytest.param(5 * STEPS + 3, False, id="losing an epoch"),
        pytest.param(2 * STEPS + 1, False, id="between teacher and student"),
        pytest.param(4 * STEPS + 1, False, id="between student alone and distillation"),
    ],
)
def test_killed_and_started_again(tmp_path: Path, step: int, often: bool) -> None:
    expected, _ = run(tmp_path / "whole", *SHORT)
    run_and_kill(tmp_path / "killed", SHORT, step=step, often=often)
    found, _ = run(tmp_path / "killed", *SHORT)
    assert metrics_of(found) == metrics_of(expected) and set(EXITS) <= set(metrics_of(found))
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


# -- full scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "epochs", "rate", "mixup"),
    [
        (("dataset=cifar100_224", "student=timm/resnet18"), 300, 0.05, 0.0),
        (("dataset=cifar100_224_mixed", "student=swin_pico"), 300, 5e-4, 0.8),
        (
            ("dataset=imagenet", "training=ofa_imagenet_cnn", "student=timm/mobilenetv2_100"),
            *(100, 0.1, 0.0),
        ),
        (("dataset=imagenet_mixed", "student=timm/resmlp_12_224"), 300, 5e-4, 0.8),
    ],
)
def test_the_papers_recipes(words, epochs: int, rate: float, mixup: float) -> None:
    teacher = ("teacher=timm/convnext_tiny", "teacher.pretrained=true")
    values = compose(["method=ofa", *teacher, *words], open_catalogue()).values
    training = values["training"]
    assert (training["epochs"], training["optimizer"]["lr"]) == (epochs, rate)
    assert training["label_smoothing"] == 0.1
    assert values["dataset"]["image_size"] == 224 and values["dataset"]["crop_scale"] == [0.08, 1.0]
    assert values["dataset"]["mix"]["mixup"] == mixup
    assert values["method"]["final_grid"] == 7


STAND_INS = {
    "a CNN learns from a ViT": (
        *("dataset=cifar100_224", "student=timm/resnet10t", "teacher=timm/vit_tiny_patch16_224"),
        "teacher.options={embed_dim:24,depth:2,num_heads:2}",
    ),
    "a Swin learns from a ConvNeXt on mixed images": (
        *("dataset=cifar100_224_mixed", "student=swin_pico", "teacher=timm/convnext_atto"),
        "student.options={embed_dim:8,depths:[1,1,1,1],num_heads:[2,2,2,2]}",
        "method.final_grid=2",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("pair", STAND_INS)
def test_a_step_at_full_scale_on_stand_ins(miniature, tmp_path: Path, pair: str) -> None:
    """The recipe of the paper on smaller images and networks, one step of every stage."""
    miniature("uoft-cs/cifar100", columns=("img", "fine_label"))
    words = ("method=ofa", *STAND_INS[pair], "trainer=cpu", "trainer.progress=off", "dry=true")
    size = ("dataset.image_size=64", "dataset.resize=64", "dataset.workers=0")
    config = compose([*words, *size, f"output_dir={tmp_path}"], open_catalogue())
    assert any(line.startswith("student") for line in check(config.values, config.names))
    result = run_experiment(config.values, names=config.names, overrides=[], command=[])
    shares = result["networks"]["distilled"]["training"]["gradient_shares"]
    assert set(shares) == {"supervised", "distillation", *EXITS}
    assert all(share > 0 for share in shares.values())
    assert set(result["networks"]) == {"teacher", "alone", "distilled", *EXITS}
