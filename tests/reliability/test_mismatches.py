"""What does not fit together is found before the first step, and told in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdrun.assembly import build_untrained
from kdrun.checkpoints import save_weights, saved_for
from kdrun.cli import run as kdrun
from kdrun.data.batches import Preprocessing
from kdrun.data.module import DataModule
from kdrun.data.normalise import Normalisation
from kdrun.data.resident import Samples
from kdrun.errors import UserError
from kdrun.experiment import prepare_data
from kdrun.fit import fit
from kdrun.given_weights import refuse_other_data
from kdrun.models.external import hf_model
from kdrun.models.mlp import MLP
from kdrun.models.vision_language import ImageConversion
from kdrun.stages import training as training_module
from tests.models.test_vision_language import tiny_clip
from tests.tiny import WORDS, composed, digits, run, small_cnn, tiny_config

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys, monkeypatch) -> Refused:
    """Runs a command that must end with one line before anything is trained; gives the line."""

    def no_training(*arguments: object, **options: object) -> None:
        raise AssertionError("training began")

    def command(*words: str) -> str:
        monkeypatch.setattr(training_module, "fit", no_training)
        assert kdrun([*WORDS, f"output_dir={tmp_path / 'out'}", *words]) == 2
        monkeypatch.setattr(training_module, "fit", fit)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return command


def weights(path: Path, width: int = 10, **signature: str) -> Path:
    network = MLP(num_classes=width, input_shape=(1, 8, 8), hidden=(128,))
    save_weights(network, path, digits().signature | signature)
    return path


HIDDEN = "teacher.hidden=[128]"


def test_a_teacher_of_other_width(tmp_path: Path, refused: Refused) -> None:
    path = weights(tmp_path / "a.safetensors", width=7)
    error = refused(f"teacher.checkpoint={path}", HIDDEN)
    assert "a.safetensors does not fit MLP: other shape: " in error
    assert "(7, 128) in the file, (10, 128) in the network" in error


def test_a_teacher_of_other_classes(tmp_path: Path, refused: Refused) -> None:
    classes = json.dumps({"count": 10, "first": ["nine", "eight", "seven"], "sha256": "x"})
    path = weights(tmp_path / "a.safetensors", 10, classes=classes)
    error = refused(f"teacher.checkpoint={path}", HIDDEN)
    assert "was made for other classes (10: nine, eight, seven, ...) than this data set's" in error
    assert "(10: 0, 1, 2, ...)" in error and "teacher.allow_other_data=true" in error


def test_a_teacher_of_other_preprocessing(tmp_path: Path, refused: Refused) -> None:
    path = weights(
        tmp_path / "a.safetensors", normalisation=json.dumps({"mean": [0.5], "std": [0.5]})
    )
    error = refused(f"teacher.checkpoint={path}", HIDDEN)
    assert (
        "was made for other normalisation (mean 0.5, std 0.5) than this data set's (mean" in error
    )
    assert "set dataset.mean and dataset.std" in error


@pytest.mark.parametrize("word", ["teacher.allow_other_data=true", "teacher.finetune=true"])
def test_it_may_be_wanted(tmp_path: Path, word: str) -> None:
    normalisation = json.dumps({"mean": [0.5], "std": [0.5]})
    node = composed("teacher=mlp", "teacher.checkpoint=x.safetensors", word).values["teacher"]
    weights(tmp_path / "x.safetensors", normalisation=normalisation)
    refuse_other_data(node | {"checkpoint": str(tmp_path / "x.safetensors")}, "teacher", digits())


@pytest.mark.slow
def test_every_weight_file_says_what_it_was_trained_on(tmp_path: Path) -> None:
    result, directory = run(tmp_path, "teacher.allow_chance=true")
    store = tmp_path / "store" / result["artefacts"]["teacher"]
    for path in (
        directory / "student.safetensors",
        directory / "student_best.safetensors",
        store / "network.safetensors",
    ):
        assert saved_for(path) == digits().signature
    words = (f"teacher.checkpoint={store / 'network.safetensors'}", "teacher.allow_chance=true")
    again, _ = run(tmp_path, *words)
    assert again["networks"]["teacher"]["test"] == result["networks"]["teacher"]["test"]


def test_files_from_elsewhere_say_nothing(tmp_path: Path) -> None:
    torch.save(small_cnn(0).state_dict(), tmp_path / "a.pt")
    save_weights(small_cnn(0), tmp_path / "a.safetensors")
    assert saved_for(tmp_path / "a.pt") == saved_for(tmp_path / "a.safetensors") == {}
    (tmp_path / "b.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"b\.safetensors: damaged, or not safetensors"):
        saved_for(tmp_path / "b.safetensors")


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)
ZERO = ([0.0] * 3, [1.0] * 3)
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
OTHER = "the pretrained teacher was made for other normalisation"


def normalised(mean: list[float], std: list[float]) -> DataModule:
    data = Numbers(target=[0, 1] * 4, shape=[3, 32, 32], mean=mean, std=std)
    data.prepare()
    return data


def teacher(*words: str) -> dict[str, Any]:
    return composed(*words, "teacher.pretrained=true").values["teacher"]


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_the_pretrained_weights_of_a_library(name: str) -> None:
    node = teacher(f"teacher={name}")
    refuse_other_data(node, "teacher", normalised(*IMAGENET))
    with pytest.raises(UserError, match=OTHER):
        refuse_other_data(node, "teacher", normalised(*HALF))


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ({"image_mean": HALF[0], "image_std": HALF[1]}, HALF),
        ({"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5}, HALF),
        ({"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False}, HALF),
        ({"image_mean": HALF[0], "image_std": HALF[1], "do_normalize": False}, ZERO),
    ],
    ids=["normalised", "rescaled otherwise", "not rescaled", "not normalised"],
)
def test_what_comes_with_weights_of_transformers(tmp_path: Path, said, fits) -> None:
    options = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    hf_model(num_classes=2, options=options).save_pretrained(tmp_path)
    node = teacher("teacher=hf", f"teacher.name={tmp_path}")
    refuse_other_data(node, "teacher", normalised(*IMAGENET))  # Nothing is said yet.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    refuse_other_data(node, "teacher", normalised(*fits))
    with pytest.raises(UserError, match=OTHER) as error:
        refuse_other_data(node, "teacher", normalised(*IMAGENET))
    assert "\n" not in str(error.value) and "set dataset.mean and dataset.std" in str(error.value)
    refuse_other_data(node | {"allow_other_data": True}, "teacher", normalised(*IMAGENET))


def test_a_clip_is_given_what_its_weights_were_made_with(tmp_path: Path) -> None:
    """It converts whatever the data set gives, so only its own options can be wrong."""
    tiny_clip(tmp_path)
    words = ("teacher=clip", f"teacher.name={tmp_path}")
    data = normalised(*IMAGENET)

    def conversion(*more: str) -> ImageConversion:
        return build_untrained(teacher(*words, *more), data, 0).conversion

    assert conversion().mean_out.flatten().tolist() == pytest.approx(OPENAI[0])
    said = {"image_mean": HALF[0], "image_std": HALF[1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    assert conversion().mean_out.unique().tolist() == [0.5]
    assert conversion().std_out.unique().tolist() == [0.5]
    refuse_other_data(teacher(*words), "teacher", data)
    typed = [f"teacher.{key}={values}" for key, values in zip(("mean", "std"), OPENAI, strict=True)]
    node = teacher(*words, *typed)
    with pytest.raises(UserError, match=OTHER) as error:
        refuse_other_data(node, "teacher", data)
    assert "leave teacher.mean and teacher.std null" in str(error.value)
    refuse_other_data(node | {"allow_other_data": True}, "teacher", data)
    assert conversion(*typed).mean_out.flatten().tolist() == pytest.approx(OPENAI[0])


def test_a_clip_of_open_clip_likewise() -> None:
    pytest.importorskip("open_clip")
    words = ("teacher=clip", "teacher.library=open_clip", "teacher.name=MobileCLIP-S1")
    for tag, mean in (("teacher.tag=datacompdr", ZERO[0]), ("teacher.tag=null", OPENAI[0])):
        network = build_untrained(teacher(*words, tag), normalised(*IMAGENET), 0)
        assert network.conversion.mean_out.flatten().tolist() == pytest.approx(mean)


class Numbers(DataModule):
    """Samples of zeros with given class ids."""

    def __init__(
        self,
        *,
        target: list[int],
        test: list[int] | None = None,
        shape: list[int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        normalisation = Normalisation(mean or [0.0], std or [1.0])
        super().__init__(val_fraction=0.25, preprocessing=Preprocessing(normalisation))
        self._targets = {"train": target, "test": target if test is None else test}
        self._shape = shape or [3]

    def load(self) -> dict[str, Samples]:
        self.class_names = ["a", "b"]
        return {
            name: Samples(
                torch.zeros(len(ids), *self._shape), torch.tensor(ids), torch.arange(len(ids))
            )
            for name, ids in self._targets.items()
        }


def collapsed(network: nn.Module, value: float, path: Path) -> str:
    """Words for a teacher of which every weight is ``value``."""
    for parameter in network.parameters():
        nn.init.constant_(parameter, value)
    torch.save(network.state_dict(), path)
    return f"teacher.checkpoint={path}"


@pytest.mark.parametrize("value", [0.0, math.nan], ids=["the same for all", "no numbers"])
def test_a_collapsed_teacher(tmp_path: Path, value: float) -> None:
    network = MLP(num_classes=10, input_shape=(1, 8, 8), hidden=(128,))
    word = collapsed(network, value, tmp_path / "a.pt")
    with pytest.raises(UserError, match="the teacher is at chance"):
        run(tmp_path, HIDDEN, word, "recipe.stages.alone=null")


@pytest.mark.parametrize("value", [0.0, math.nan], ids=["the same for all", "no numbers"])
def test_a_collapsed_teacher_of_language(tmp_path: Path, value: float) -> None:
    (tmp_path / "texts").mkdir()
    text = "".join(f"{i} and {i} is {2 * i}.\n" for i in range(60))
    (tmp_path / "texts" / "a.txt").write_text(text)
    words = (
        *("dataset=text_folder", f"dataset.source.path={tmp_path / 'texts'}", "dataset.length=8"),
        *("teacher=gpt2_nano", "student=gpt2_nano", "recipe.stages.alone=null"),
    )
    config = tiny_config(tmp_path, *words).values
    network = build_untrained(config["teacher"], prepare_data(config)[0], 0)
    with pytest.raises(UserError, match="the teacher is at chance"):
        run(tmp_path, *words, collapsed(network, value, tmp_path / "a.pt"))


def test_labels_outside_the_classes() -> None:
    Numbers(target=[0, 1] * 4).prepare()
    data = Numbers(target=[0, 1] * 4, test=[0, 1, 2])
    with pytest.raises(UserError, match="sample 2 of the test split has the class 2, but there"):
        data.prepare()
    with pytest.raises(UserError, match=r"split has the class 5, but there are 2 classes"):
        Numbers(target=[0, 1, 5, 1] * 2).prepare()
    with pytest.raises(UserError, match="sample 0 of the test split has the class -1"):
        Numbers(target=[0, 1] * 4, test=[-1, 1]).prepare()
