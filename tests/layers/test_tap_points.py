"""Taps of networks that do not declare them: timm, torchvision, transformers and one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdrun.layers.layout import Layout
from kdrun.layers.taps import attach, tap_layout, tap_points


def shapes_of_taps(network: nn.Module, inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of each named tap, without the batch."""
    names = [name for name in tap_points(network, inputs) if "." not in name]
    taps = attach(network, names, inputs)
    with taps, torch.no_grad():
        network.eval()(inputs)
    return {name: tuple(feature.shape[1:]) for name, feature in taps.collect().items()}


def test_torchvision_resnet_has_the_stages_everybody_means() -> None:
    from torchvision.models import resnet18

    network = resnet18(num_classes=5)
    points = tap_points(network, torch.randn(2, 3, 32, 32))
    assert points == {
        "stem": "relu",
        "stem.preactivation": "input:relu",
        "stem.norm": "bn1",
        "stage1": "layer1",
        "stage1.preactivation": "input:layer1.1.relu",
        "stage1.norm": "layer1.1.bn2",
        "stage2": "layer2",
        "stage2.preactivation": "input:layer2.1.relu",
        "stage2.norm": "layer2.1.bn2",
        "stage3": "layer3",
        "stage3.preactivation": "input:layer3.1.relu",
        "stage3.norm": "layer3.1.bn2",
        "stage4": "layer4",
        "stage4.preactivation": "input:layer4.1.relu",
        "stage4.norm": "layer4.1.bn2",
        "penultimate": "input:fc",
    }
    taps = attach(network, ("stage4", "stage4.preactivation"), torch.randn(2, 3, 32, 32))
    with taps:
        network(torch.randn(2, 3, 32, 32))
    after, before = taps.collect().values()
    assert before.min() < 0
    assert torch.equal(after, functional.relu(before))


def test_a_one_block_stage_takes_its_norm_from_the_main_path() -> None:
    import timm

    network = timm.create_model("resnet10t", num_classes=5)
    points = tap_points(network, torch.randn(1, 3, 64, 64))
    assert points["stage2.norm"] == "layer2.0.bn2"
    assert "downsample" in dict(network.layer2[0].named_children())


def test_torchvision_swin_maps_come_channels_first() -> None:
    from torchvision.models import SwinTransformer

    network = SwinTransformer(
        patch_size=[2, 2],
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 1, 1],
        window_size=[4, 4],
        num_classes=5,
    )
    assert tap_layout(network) == Layout(channels_last=True)
    shapes = shapes_of_taps(network, torch.randn(2, 3, 32, 32))
    assert shapes == {
        "stage1": (8, 16, 16),
        "stage2": (16, 8, 8),
        "stage3": (32, 4, 4),
        "penultimate": (32,),
    }


def test_torchvision_vit_is_cut_by_depth() -> None:
    from torchvision.models import VisionTransformer

    network = VisionTransformer(
        image_size=16,
        patch_size=4,
        num_layers=6,
        num_heads=1,
        hidden_dim=8,
        mlp_dim=8,
        num_classes=5,
    )
    points = tap_points(network, torch.randn(2, 3, 16, 16))
    layers = [points[f"stage{number}"].rpartition("_")[2] for number in (1, 2, 3, 4)]
    assert layers == ["0", "1", "4", "5"]
    shapes = shapes_of_taps(network, torch.randn(2, 3, 16, 16))
    assert shapes == {f"stage{n}": (8, 4, 4) for n in (1, 2, 3, 4)} | {"penultimate": (8,)}


@pytest.mark.parametrize(
    ("name", "options", "blocks", "special_tokens"),
    [
        ("vit_tiny_patch16_224", {"depth": 12}, [1, 3, 9, 11], 1),
        ("vit_tiny_patch16_224", {"depth": 3}, [0, 1, 2], 1),
        ("deit_tiny_distilled_patch16_224", {"depth": 4}, [0, 1, 2, 3], 2),
    ],
)
def test_vision_transformers_of_timm(name, options, blocks, special_tokens) -> None:
    import timm

    network = timm.create_model(
        name, num_classes=5, img_size=16, patch_size=4, embed_dim=8, num_heads=1, **options
    )
    assert tap_layout(network) == Layout(special_tokens=special_tokens)
    inputs = torch.randn(2, 3, 16, 16)
    points = tap_points(network, inputs)
    assert [points[f"stage{i + 1}"] for i in range(len(blocks))] == [f"blocks.{b}" for b in blocks]
    assert points["penultimate"] == "input:head"
    taps = attach(network, ("stage1.tokens",), inputs)
    with taps:
        network(inputs)
    assert taps.collect()["stage1"].shape == (2, 16 + special_tokens, 8)
    taps.remove()
    assert shapes_of_taps(network, inputs)["stage2"] == (8, 4, 4)


def test_a_vision_transformer_for_any_image_size_is_cut_as_the_others() -> None:
    """Its patches leave the embedding as a map with channels last."""
    import timm

    network = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=5,
        img_size=16,
        patch_size=4,
        embed_dim=8,
        num_heads=1,
        depth=12,
        dynamic_img_size=True,
    )
    points = tap_points(network, torch.randn(2, 3, 16, 16))
    assert [points[f"stage{n}"] for n in (1, 2, 3, 4)] == [f"blocks.{b}" for b in (1, 3, 9, 11)]


@pytest.mark.parametrize(
    ("name", "size", "stages", "pooled"),
    [
        ("pvt_v2_b0", 64, [(32, 16, 16), (64, 8, 8), (160, 4, 4), (256, 2, 2)], 256),
        pytest.param(
            *("sequencer2d_s", 224, [(192, 32, 32), (384, 16, 16)], 384), marks=pytest.mark.slow
        ),
    ],
)
def test_networks_that_change_their_layout_on_the_way(name, size, stages, pooled) -> None:
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, num_classes=5)
        shapes = shapes_of_taps(network, torch.zeros(2, 3, size, size))
    assert [shapes[f"stage{n}"] for n in range(1, len(stages) + 1)] == stages
    assert shapes["penultimate"] == (pooled,)


class PixelsOfPatches(nn.Module):
    """Three blocks on the pixels of each patch, a row each, then two on the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.inner = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(3)))
        self.outer = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = self.inner(tokens.reshape(-1, 4, 2)).reshape(tokens.shape)
        for block in self.outer:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def test_blocks_on_parts_of_a_sample_are_no_stages() -> None:
    network = PixelsOfPatches()
    points = tap_points(network, torch.randn(2, 3, 16, 16))
    assert [points[name] for name in ("stage1", "stage2")] == ["outer.0", "outer.1"]
    shapes = shapes_of_taps(network, torch.randn(2, 3, 16, 16))
    assert shapes == {"stage1": (8, 4, 4), "stage2": (8, 4, 4), "penultimate": (8,)}


def test_an_mlp_mixer_is_cut_by_depth_and_has_no_special_tokens() -> None:
    from timm.models.mlp_mixer import MlpMixer

    network = MlpMixer(num_classes=5, img_size=16, patch_size=4, embed_dim=8, num_blocks=6)
    inputs = torch.randn(2, 3, 16, 16)
    points = tap_points(network, inputs)
    assert [points[f"stage{n}"] for n in (1, 2, 3, 4)] == [f"blocks.{b}" for b in (0, 1, 4, 5)]
    assert shapes_of_taps(network, inputs)["stage1"] == (8, 4, 4)


def test_timm_swin_and_convnext_end_stages_before_downsampling() -> None:
    import timm

    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=5,
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(1, 1, 1),
        num_heads=(1, 1, 1),
    )
    expected = {"stage1": (8, 16, 16), "stage2": (16, 8, 8), "stage3": (32, 4, 4)}
    assert shapes_of_taps(swin, torch.randn(2, 3, 32, 32)) == expected | {"penultimate": (32,)}
    convnext = timm.create_model(
        "convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)
    )
    points = tap_points(convnext, torch.randn(2, 3, 64, 64))
    assert [points[f"stage{n}"] for n in (1, 2, 3, 4)] == [f"stages.{n}" for n in range(4)]


def test_squeeze_and_excitation_is_no_stage() -> None:
    from torchvision.models import mobilenet_v3_small

    shapes = shapes_of_taps(mobilenet_v3_small(num_classes=5), torch.randn(2, 3, 64, 64))
    sides = {name: shape[-1] for name, shape in shapes.items() if name != "penultimate"}
    assert sides == {"stem": 32, "stage1": 16, "stage2": 8, "stage3": 4, "stage4": 2}


def test_a_classifier_that_is_a_convolution() -> None:
    from torchvision.models import squeezenet1_1

    network = squeezenet1_1(num_classes=5)
    inputs = torch.randn(2, 3, 64, 64)
    assert tap_points(network, inputs)["penultimate"] == "input:classifier.1"
    assert shapes_of_taps(network, inputs)["penultimate"] == (512,)


def test_transformers_image_classifiers() -> None:
    from transformers import AutoConfig, AutoModelForImageClassification

    sizes = {"image_size": 16, "num_labels": 5}
    vit = AutoConfig.for_model(
        "vit",
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=8,
        **sizes,
    )
    network = AutoModelForImageClassification.from_config(vit)
    assert tap_layout(network) == Layout(special_tokens=1)
    shapes = shapes_of_taps(network, torch.randn(2, 3, 16, 16))
    assert shapes == {f"stage{n}": (8, 4, 4) for n in (1, 2, 3)} | {"penultimate": (8,)}
    swin = AutoConfig.for_model(
        "swinv2",
        patch_size=1,
        embed_dim=8,
        depths=[1, 2, 1],
        num_heads=[1, 1, 1],
        window_size=4,
        **sizes,
    )
    shapes = shapes_of_taps(
        AutoModelForImageClassification.from_config(swin), torch.randn(2, 3, 16, 16)
    )
    expected = {"stage1": (8, 16, 16), "stage2": (16, 8, 8), "stage3": (32, 4, 4)}
    assert shapes == expected | {"penultimate": (32,)}


def test_language_models_keep_their_tokens() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=1,
        intermediate_size=8,
        vocab_size=11,
        num_labels=3,
    )
    network = BertForSequenceClassification(config)
    assert tap_layout(network) is None
    sample = {"input_ids": torch.zeros(2, 9, dtype=torch.long)}
    taps = attach(network, ("stages",), sample)
    with taps:
        network(**sample)
    assert {name: tuple(f.shape) for name, f in taps.collect().items()} == {
        f"stage{n}": (2, 9, 8) for n in (1, 2, 3, 4)
    }


class Nested(nn.Module):
    """One's own: all in a container, with strided shortcuts and pooling inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), Strided(4, 8), Strided(8, 16), Strided(16, 32)
        )
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.body(x).mean((2, 3))))


class Strided(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width))
        self.side = nn.Conv2d(channels, width, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.side(x)


def test_a_network_of_ones_own() -> None:
    network = Nested()
    assert tap_points(network, torch.randn(2, 3, 32, 32)) == {
        "stage1": "body.0",
        "stage2": "body.1",
        "stage3": "body.2",
        "stage4": "body.3",
        "penultimate": "input:out",
    }


def test_looking_for_taps_leaves_the_network_as_it_was() -> None:
    network = Nested()
    network.body[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    tap_points(network, torch.randn(2, 3, 32, 32))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_failing_forward_leaves_no_hooks() -> None:
    network = Nested()
    with pytest.raises(RuntimeError):
        tap_points(network, torch.randn(2, 7, 32, 32))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert network.training
