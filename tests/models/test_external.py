"""Networks of timm, torchvision and transformers, with weights made on the spot."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from kdrun.checkpoints import load_weights, save_weights
from kdrun.errors import UserError
from kdrun.layers.taps import attach
from kdrun.models.external import hf_model, timm_model, torchvision_model

VIT = "vit_tiny_patch16_224"
TINY_VIT = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 1}
TINY_HF = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
TINY_HF |= {"model_type": "resnet"}
TINY_TORCHVISION = "shufflenet_v2_x0_5"


def same_weights(first: nn.Module, second: nn.Module, but: str = " ") -> bool:
    theirs = second.state_dict()
    names = [name for name in first.state_dict() if not name.startswith(but)]
    return all(torch.equal(first.state_dict()[name], theirs[name]) for name in names)


# -- timm -----------------------------------------------------------------------------------------
def tiny_timm(num_classes: int = 5, in_channels: int = 3, **options) -> nn.Module:
    return timm_model(
        name=VIT,
        pretrained="pretrained_cfg_overlay" in options,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=16,
        options=TINY_VIT | options,
    )


def test_timm_takes_classes_channels_and_size_from_the_data() -> None:
    network = tiny_timm(num_classes=7, in_channels=1)
    assert network(torch.randn(2, 1, 16, 16)).shape == (2, 7)


def test_timm_without_a_fixed_size_is_not_given_one() -> None:
    network = timm_model(name="mobilenetv3_small_050", num_classes=5, in_channels=1, image_size=32)
    assert network.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_pretrained(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    source = tiny_timm()
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_weights(source, path)
    overlay = {"file": str(path), "num_classes": 5, "custom_load": False}
    assert same_weights(source, tiny_timm(pretrained_cfg_overlay=overlay))
    with pytest.warns(UserWarning, match="pretrained classifier has 5 classes, the data set 3"):
        other = tiny_timm(num_classes=3, pretrained_cfg_overlay=overlay)
    assert same_weights(source, other, but="head")
    assert other.head.out_features == 3


def test_timm_pretrained_on_grey_images_folds_the_first_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tiny_timm()
    save_weights(source, tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 5, "custom_load": False}
    grey = tiny_timm(in_channels=1, pretrained_cfg_overlay=overlay)
    image = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(grey(image), source(image.expand(-1, 3, -1, -1)))


def test_timm_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"timm/vit_tiny_patch16_224: .*fetched or read") as caught:
        tiny_timm(pretrained_cfg_overlay={"file": str(tmp_path / "nowhere.safetensors")})
    assert "\n" not in str(caught.value)


def test_timm_checkpoint_files_load_like_any_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = tiny_timm(), tiny_timm()
    torch.save({"state_dict": source.state_dict(), "arch": VIT}, tmp_path / "checkpoint.pth.tar")
    assert load_weights(target, tmp_path / "checkpoint.pth.tar").is_complete
    assert same_weights(source, target)


def test_timm_unknown_name_and_option() -> None:
    with pytest.raises(UserError, match="no network timm/resnt18; did you mean .*resnet18"):
        timm_model(name="resnt18", num_classes=5)
    with pytest.raises(UserError, match="timm/resnet18 cannot be built: .*colour"):
        timm_model(name="resnet18", num_classes=5, options={"colour": "red"})


# -- torchvision ----------------------------------------------------------------------------------
def test_torchvision_takes_classes_and_channels_from_the_data() -> None:
    network = torchvision_model(name=TINY_TORCHVISION, num_classes=7, in_channels=1)
    assert network.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    with torch.device("meta"):
        vit = torchvision_model(name="vit_b_32", num_classes=3, options={"image_size": 64})
    assert vit.image_size == 64


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """An empty torch hub folder, without a network."""

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_torchvision_pretrained(hub: Path) -> None:
    from torchvision.models import get_model_weights

    torch.manual_seed(0)
    source = torchvision_model(name=TINY_TORCHVISION, num_classes=1000)
    url = get_model_weights(TINY_TORCHVISION).DEFAULT.url
    torch.save(source.state_dict(), hub / url.rpartition("/")[2])
    loaded = torchvision_model(name=TINY_TORCHVISION, pretrained=True, num_classes=1000)
    assert same_weights(source, loaded)
    with pytest.warns(UserWarning, match="has 1000 classes, the data set 5"):
        other = torchvision_model(name=TINY_TORCHVISION, pretrained=True, num_classes=5)
    assert same_weights(source, other, but="fc")
    assert other.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_torchvision_weights_that_cannot_be_fetched(hub: Path) -> None:
    with pytest.raises(UserError, match=r"torchvision/shufflenet_v2_x0_5: .*no network") as caught:
        torchvision_model(name=TINY_TORCHVISION, pretrained=True, num_classes=1000)
    assert "\n" not in str(caught.value)


def test_torchvision_pretrained_reads_colour_only() -> None:
    with pytest.raises(UserError, match="read 3 channels but the images have 1"):
        torchvision_model(name=TINY_TORCHVISION, pretrained=True, num_classes=5, in_channels=1)


def test_torchvision_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = torchvision_model(name=TINY_TORCHVISION, num_classes=5)
    target = torchvision_model(name=TINY_TORCHVISION, num_classes=5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth").is_complete
    assert same_weights(source, target)


def test_torchvision_unknown_name_and_option() -> None:
    with pytest.raises(UserError, match="no network torchvision/resnet19; did you mean .*resnet1"):
        torchvision_model(name="resnet19", num_classes=5)
    with pytest.raises(UserError, match="torchvision/resnet18 cannot be built: .*colour"):
        torchvision_model(name="resnet18", num_classes=5, options={"colour": "red"})


# -- transformers ---------------------------------------------------------------------------------
def test_transformers_network_from_options_alone() -> None:
    network = hf_model(num_classes=5, in_channels=1, image_size=32, options=TINY_HF)
    assert network(torch.randn(2, 1, 32, 32)).logits.shape == (2, 5)


def test_transformers_vit_takes_the_image_size() -> None:
    options = {"model_type": "vit", "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 1, "intermediate_size": 8}
    network = hf_model(num_classes=5, in_channels=1, image_size=8, options=options)
    assert network(torch.randn(2, 1, 8, 8)).logits.shape == (2, 5)


def test_transformers_pretrained_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = hf_model(num_classes=5, options=TINY_HF)
    source.save_pretrained(tmp_path)
    loaded = hf_model(name=str(tmp_path), pretrained=True, num_classes=5)
    assert same_weights(source, loaded)
    with pytest.warns(UserWarning, match="has 5 classes, the data set 3"):
        other = hf_model(name=str(tmp_path), pretrained=True, num_classes=3)
    assert same_weights(source, other, but="classifier")
    fresh = hf_model(name=str(tmp_path), num_classes=3)
    assert not same_weights(source, fresh, but="classifier")
    assert fresh.config.hidden_sizes == [8, 16]


def test_transformers_weights_are_safetensors_and_load_as_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = (hf_model(num_classes=5, options=TINY_HF) for _ in range(2))
    source.save_pretrained(tmp_path)
    assert load_weights(target, tmp_path / "model.safetensors").is_complete
    assert same_weights(source, target)


def test_transformers_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give name"):
        hf_model(num_classes=5)
    with pytest.raises(UserError, match="no option hiden_sizes; hidden_sizes"):
        hf_model(num_classes=5, options={"model_type": "resnet", "hiden_sizes": [8]})
    with pytest.raises(UserError, match="hf/nonsense cannot be built"):
        hf_model(num_classes=5, options={"model_type": "nonsense"})
    with pytest.raises(UserError, match="its files cannot be fetched or read"):
        hf_model(name=str(tmp_path / "nowhere"), num_classes=5)


def test_code_that_comes_with_weights_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", '
        '"AutoModelForImageClassification": "evil.Net"}}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Evil: ...\n")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="trust_remote_code"):
        hf_model(name=str(tmp_path), pretrained=True, num_classes=5)
    assert not trap.exists()


# -- the ImageNet networks of the distillation literature ------------------------------------------


@pytest.mark.parametrize(
    ("library", "name", "parameters", "pooled"),
    [
        (torchvision_model, "resnet18", 11_689_512, 512),
        (torchvision_model, "resnet34", 21_797_672, 512),
        (torchvision_model, "resnet50", 25_557_032, 2048),
        (timm_model, "mobilenetv1_100", 4_231_976, 1024),
    ],
)
def test_imagenet_networks(library, name: str, parameters: int, pooled: int) -> None:
    with torch.device("meta"):
        network = library(name=name, num_classes=1000)
        inputs = torch.zeros(1, 3, 224, 224)
    assert sum(p.numel() for p in network.parameters()) == parameters
    taps = attach(network, ("stem", "stages", "stages.preactivation", "penultimate"), inputs)
    with taps:
        network.eval()(inputs)
    features = taps.collect()
    assert features.pop("penultimate").shape == (1, pooled)
    sides = [112, 56, 28, 14, 7, 56, 28, 14, 7]
    assert [feature.shape[-1] for feature in features.values()] == sides
