"""The benchmark networks against the literature: parameters, stage shapes, taps, names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

import kdrun
from kdrun.checkpoints import load_weights
from kdrun.layers.taps import attach, tap_points
from kdrun.models import build_model

CONFIGS = Path(kdrun.__file__).parents[1] / "conf" / "model"

RESNET = [(16, 32), (16, 32), (32, 16), (64, 8)]
VGG = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]
BASIC = [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)]
BOTTLENECK = [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)]

# Name: parameters at 100 classes, (channels, side) of stem and stages at 32x32, pooled width.
TABLE = {
    "resnet8": (83_892, RESNET, 64),
    "resnet14": (181_108, RESNET, 64),
    "resnet20": (278_324, RESNET, 64),
    "resnet32": (472_756, RESNET, 64),
    "resnet44": (667_188, RESNET, 64),
    "resnet56": (861_620, RESNET, 64),
    "resnet110": (1_736_564, RESNET, 64),
    "resnet8x4": (1_233_540, [(32, 32), (64, 32), (128, 16), (256, 8)], 256),
    "resnet32x4": (7_433_860, [(32, 32), (64, 32), (128, 16), (256, 8)], 256),
    "wrn_16_1": (180_916, RESNET, 64),
    "wrn_40_1": (569_780, RESNET, 64),
    "wrn_16_2": (703_284, [(16, 32), (32, 32), (64, 16), (128, 8)], 128),
    "wrn_40_2": (2_255_156, [(16, 32), (32, 32), (64, 16), (128, 8)], 128),
    "vgg8": (3_965_028, VGG, 512),
    "vgg11": (9_277_284, VGG, 512),
    "vgg13": (9_462_180, VGG, 512),
    "vgg16": (14_774_436, VGG, 512),
    "vgg19": (20_086_692, VGG, 512),
    "mobilenet_v2": (812_836, [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    "shufflenet_v1": (949_258, [(24, 32), (240, 16), (480, 8), (960, 4)], 960),
    "shufflenet_v2": (1_355_528, [(24, 32), (116, 16), (232, 8), (464, 4)], 1024),
    "resnet18": (11_220_132, BASIC, 512),
    # ImageNet's 21,797,672 less 7,680 of the 7x7 stem and 900 classes of 513 weights each.
    "resnet34": (21_328_292, BASIC, 512),
    "resnet50": (23_705_252, BOTTLENECK, 2048),
}

LIGHT = ["resnet8", "resnet8x4", "wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1"]
LIGHT += ["shufflenet_v2"]


def build(name: str, num_classes: int = 100, input_shape=(3, 32, 32)) -> nn.Module:
    node = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return build_model(node, num_classes=num_classes, input_shape=input_shape)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_stages_and_pooled_width_are_those_of_the_literature(name: str) -> None:
    parameters, stages, pooled = TABLE[name]
    with torch.device("meta"):
        network = build(name)
        inputs = torch.zeros(2, 3, 32, 32)
    assert sum(p.numel() for p in network.parameters()) == parameters
    taps = attach(network, ("stem", "stages", "penultimate"))
    with taps:
        logits = network(inputs)
    features = taps.collect()
    assert logits.shape == (2, 100)
    assert features.pop("penultimate").shape == (2, pooled)
    assert [tuple(f.shape) for f in features.values()] == [(2, c, s, s) for c, s in stages]


@pytest.mark.parametrize("name", TABLE)
def test_the_config_states_the_parameter_count(name: str) -> None:
    header = (CONFIGS / f"{name}.yaml").read_text().split("_target_")[0].replace("\n# ", " ")
    assert f" {TABLE[name][0]:,} parameters at 100 classes" in header


@pytest.mark.parametrize("name", TABLE)
def test_eight_pixel_grey_images_are_read(name: str) -> None:
    with torch.device("meta"):
        network = build(name, num_classes=10, input_shape=(1, 8, 8)).eval()
        assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "shufflenet_v1", "shufflenet_v2"])
def test_a_stage_is_its_preactivation_rectified(name: str) -> None:
    torch.manual_seed(0)
    network = build(name)
    taps = attach(network, ("stem", "stages", "stem.preactivation", "stages.preactivation"))
    with taps:
        network(torch.randn(2, 3, 32, 32))
    features = taps.collect()
    stages = [tap for tap in features if not tap.endswith(".preactivation")]
    assert len(stages) >= 4
    for stage in stages:
        before = features[f"{stage}.preactivation"]
        assert before.min() < 0, "overwritten by its own rectifier"
        assert torch.equal(features[stage], functional.relu(before))


def test_wide_resnet_stages_are_raw_sums_and_preactivations_their_next_norm() -> None:
    torch.manual_seed(0)
    network = build("wrn_16_2").eval()
    taps = attach(network, ("stem", "stages", "stem.preactivation", "stages.preactivation"))
    with taps:
        network(torch.randn(2, 3, 32, 32))
    features = taps.collect()
    norms = {"stem": network.block1[0].bn1, "stage1": network.block2[0].bn1}
    norms |= {"stage2": network.block3[0].bn1, "stage3": network.bn1}
    for name, norm in norms.items():
        assert features[name].min() < 0
        torch.testing.assert_close(features[f"{name}.preactivation"], norm(features[name]))


def test_wide_resnet_taps_do_not_move_statistics_twice() -> None:
    torch.manual_seed(0)
    network = build("wrn_16_1")
    with attach(network, ("stages.preactivation",)):
        network(torch.randn(4, 3, 8, 8))
    counters = [value for name, value in network.named_buffers() if name.endswith("tracked")]
    assert counters and all(counter == 1 for counter in counters)


def test_mobilenet_stages_are_linear_and_their_own_preactivation() -> None:
    torch.manual_seed(0)
    network = build("mobilenet_v2")
    taps = attach(network, ("stages", "stages.preactivation"))
    with taps:
        network(torch.randn(2, 3, 32, 32))
    features = taps.collect()
    assert len(features) == 8
    for stage in (f"stage{number}" for number in range(1, 5)):
        assert features[stage].min() < 0
        assert torch.equal(features[stage], features[f"{stage}.preactivation"])
        assert f"{stage}.norm" not in tap_points(network)


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg13", "resnet50"])
def test_norm_taps_are_batch_norms_as_wide_as_the_preactivation(name: str) -> None:
    with torch.device("meta"):
        network = build(name)
        points = tap_points(network)
        taps = attach(network, ("stages.preactivation",))
        with taps:
            network(torch.zeros(2, 3, 32, 32))
        features = taps.collect()
    for stage in (name for name in points if name.endswith(".norm") and name != "stem.norm"):
        norm = network.get_submodule(points[stage])
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_features == features[stage.replace(".norm", ".preactivation")].shape[1]


@pytest.mark.parametrize("name", LIGHT)
def test_gradient_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=10, input_shape=(1, 8, 8))
    functional.cross_entropy(network(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_channel_shuffle_interleaves_groups() -> None:
    from kdrun.models.channel_shuffle import channel_shuffle

    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert channel_shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert channel_shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_shufflenet_v2_unit_is_the_papers() -> None:
    """One branch rectified before concatenation and shuffle, as it is published."""
    from kdrun.models.shufflenet_v2 import BasicUnit

    torch.manual_seed(0)
    unit = BasicUnit(8).eval()
    x = torch.rand(2, 8, 4, 4)  # what a unit reads is never negative
    kept, half = x[:, :4], x[:, 4:]
    half = functional.relu(unit.bn1(unit.conv1(half)))
    half = functional.relu(unit.bn3(unit.conv3(unit.bn2(unit.conv2(half)))))
    expected = torch.stack([kept, half], dim=2).flatten(1, 2)
    torch.testing.assert_close(unit(x), expected)


def test_vgg_pools_after_the_fourth_group_from_64_pixels_on() -> None:
    with torch.device("meta"):
        network = build("vgg8")
        taps = attach(network, ("stage3", "stage4"))
        with taps:
            network(torch.zeros(1, 3, 64, 64))
    assert [f.shape[-1] for f in taps.collect().values()] == [8, 4]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenet_v2"])
def test_convolutions_start_with_he_variance(name: str) -> None:
    torch.manual_seed(0)
    network = build(name)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected = (2 / fan_out) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", {"downsample": "shortcut", "fc.": "linear."}),
        ("wrn_16_2", {"block1.": "block1.layer.", "shortcut": "convShortcut"}),
        ("mobilenet_v2", {"classifier.": "classifier.0."}),
    ],
)
def test_names_of_the_released_benchmark_code_load(name: str, theirs: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = build(name), build(name)
    renamed = {}
    for key, value in source.state_dict().items():
        for ours, other in theirs.items():
            key = key.replace(ours, other)
        renamed[f"module.{key}"] = value
    torch.save({"model": renamed, "epoch": 240}, tmp_path / "teacher.pth")
    assert load_weights(target, tmp_path / "teacher.pth").is_complete
    for ours, copied in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(ours, copied)


def test_impossible_shapes_of_networks_are_refused() -> None:
    from kdrun.models.resnet import ResNet
    from kdrun.models.vgg import VGG
    from kdrun.models.wide_resnet import WideResNet

    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(num_classes=10, depth=20)
    with pytest.raises(ValueError, match="differ in length"):
        ResNet(num_classes=10, blocks=(1, 1), widths=(16, 32, 64))
    with pytest.raises(ValueError, match="five groups"):
        VGG(num_classes=10, convolutions=(1, 1))


@pytest.mark.parametrize("name", LIGHT + ["resnet50", "small_cnn", "mlp"])
def test_no_tap_is_overwritten_in_place(name: str) -> None:
    """Taps of one forward against copies made at the moment of recording."""
    torch.manual_seed(0)
    network = build(name, num_classes=10, input_shape=(1, 8, 8)).eval()
    names = list(tap_points(network))
    taps = attach(network, [tap for tap in names if not tap.endswith(".norm")])
    copies: dict[str, torch.Tensor] = {}

    def keep(tap: str):
        def hook(_: nn.Module, arguments: tuple, output: torch.Tensor | None = None) -> None:
            copies[tap] = (arguments[0] if output is None else output).clone()

        return hook

    for tap in taps.names:
        location = tap_points(network)[tap]
        module = network.get_submodule(location.removeprefix("input:"))
        if location.startswith("input:"):
            module.register_forward_pre_hook(keep(tap))
        else:
            module.register_forward_hook(keep(tap))
    with taps, torch.no_grad():
        network(torch.randn(2, 1, 8, 8))
    features = taps.collect()
    assert set(copies) == set(features)
    assert all(torch.equal(features[tap], copies[tap]) for tap in features)
