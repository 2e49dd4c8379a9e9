"""Networks on one or several named inputs."""

from __future__ import annotations

import pytest
import torch

from kdrun.layers.taps import attach
from kdrun.models.av_mnist import AVFusion, LeNet5, SpectrogramCNN
from kdrun.models.multimodal import ConvNet, FusionNet

SHAPES = {"image": (1, 16, 16), "audio": (1, 32, 32)}
INPUTS = {name: torch.randn(2, *shape) for name, shape in SHAPES.items()}


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_one_input() -> None:
    network = ConvNet(num_classes=10, input_shape=SHAPES["audio"])
    assert network(INPUTS["audio"]).shape == (2, 10)
    # Two convolutions, 32 maps of 8x8 to 64, 64 to 48, 48 to 10.
    expected = (9 + 1) * 16 + (16 * 9 + 1) * 32 + (2048 + 1) * 64 + 65 * 48 + 49 * 10
    assert parameters(network) == expected


def test_several_inputs_by_name_and_their_taps() -> None:
    network = FusionNet(num_classes=10, input_shape=SHAPES).eval()
    logits = network(**INPUTS)
    assert logits.shape == (2, 10)
    assert not torch.equal(network(image=INPUTS["image"], audio=INPUTS["audio"] * 2), logits)
    taps = attach(network, ("stages.preactivation", "penultimate"), sample=INPUTS)
    with taps:
        network(**INPUTS)
    found = taps.collect()
    assert found["stage1.preactivation"].shape == (2, 64)
    assert torch.equal(found["stage2.preactivation"].relu(), found["penultimate"])


def test_several_inputs_are_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match="this data set has one"):
        FusionNet(num_classes=10, input_shape=(1, 8, 8))


def test_the_networks_of_av_mnist() -> None:
    image, audio = torch.randn(2, 1, 28, 28), torch.randn(2, 1, 112, 112)
    lenet = LeNet5(num_classes=10)
    assert lenet(image).shape == (2, 10) and parameters(lenet) == 61_706, "LeNet-5"
    spectrogram = SpectrogramCNN(num_classes=10, input_shape=(1, 112, 112))
    assert spectrogram(audio).shape == (2, 10)
    assert spectrogram.classifier.in_features == 128 * 14 * 14
    fusion = AVFusion(num_classes=10)
    assert fusion(image=image, audio=audio).shape == (2, 10)
    assert (fusion.fc1.in_features, fusion.fc1.out_features) == (596, 298)
