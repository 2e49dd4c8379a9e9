"""The networks of the AV-MNIST experiments of MST-Distill: images 28x28, spectrograms 112x112.

Layers and widths are those of the authors' code (Li et al., ACM Multimedia 2025); where the ReLUs
and poolings of the fusion network's audio trunk stand is not given and follows the other networks.
Masks act on the output of a layer, before its ReLU: the ``.preactivation`` of a stage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdrun.parameters import PositiveInt


class LeNet5(nn.Module):
    """LeNet-5 on images of 28x28: three 5x5 convolutions, two linear layers.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        widths: channels of the convolutions.
        hidden: width of the linear layer.

    Taps: stages 1 to 3 are the convolutions, stage 4 is the linear layer, after their ReLU.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 1,
        widths: Sequence[PositiveInt] = (6, 16, 120),
        hidden: PositiveInt = 84,
    ) -> None:
        super().__init__()
        self.layers = lenet_trunk(in_channels, widths, hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, 28, 28)`` to logits ``(B, num_classes)``."""
        return self.classifier(self.layers(x))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {}
        for number, layer in enumerate(("conv1", "conv2", "conv3", "fc1"), start=1):
            points[f"stage{number}"] = f"layers.{layer}_relu"
            points[f"stage{number}.preactivation"] = f"layers.{layer}"
        return points | {"penultimate": "input:classifier"}


class SpectrogramCNN(nn.Module):
    """Three 3x3 convolutions, each with ReLU and max-pooling by 2, and a linear classifier.

    Args:
        num_classes: outputs of the classifier.
        input_shape: of one spectrogram, ``(C, H, W)``.
        widths: channels of the convolutions.

    Taps: the stages are the convolutions after their ReLU.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        input_shape: Sequence[PositiveInt],
        widths: Sequence[PositiveInt] = (32, 64, 128),
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.layers = audio_trunk(channels, widths)
        positions = (height // 2 ** len(widths)) * (width // 2 ** len(widths))
        self.classifier = nn.Linear(widths[-1] * positions, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Spectrograms ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        return self.classifier(self.layers(x).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {}
        for number in range(1, len(self.layers) // 3 + 1):
            points[f"stage{number}"] = f"layers.conv{number}_relu"
            points[f"stage{number}.preactivation"] = f"layers.conv{number}"
        return points | {"penultimate": "input:classifier"}


class AVFusion(nn.Module):
    """LeNet-5's layers and a five-convolution audio trunk, concatenated, and two linear layers.

    There is no ReLU between the two linear layers.

    Args:
        num_classes: outputs of the classifier.
        image_widths: channels of the image trunk's convolutions.
        image_features: width of its linear layer.
        audio_widths: channels of the audio trunk's convolutions.
        hidden: width of the first linear layer on both.

    Taps: stage 1 is the concatenated vector, stage 2 the first linear layer.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        image_widths: Sequence[PositiveInt] = (6, 16, 120),
        image_features: PositiveInt = 84,
        audio_widths: Sequence[PositiveInt] = (32, 64, 128, 256, 512),
        hidden: PositiveInt = 298,
    ) -> None:
        super().__init__()
        self.image = lenet_trunk(1, image_widths, image_features)
        self.audio = audio_trunk(1, audio_widths)
        self.concat = nn.Identity()
        self.fc1 = nn.Linear(image_features + audio_widths[-1], hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        """Images ``(B, 1, 28, 28)`` and spectrograms ``(B, 1, H, W)`` to ``(B, num_classes)``."""
        heard = self.audio(audio).mean((2, 3))
        joined = self.concat(torch.cat([self.image(image), heard], dim=1))
        return self.classifier(self.fc1(joined))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        return {"stage1": "concat", "stage2": "fc1", "penultimate": "input:classifier"}


def lenet_trunk(channels: int, widths: Sequence[int], hidden: int) -> nn.Sequential:
    """Images of 28x28 to ``hidden`` features; average pooling after the first two convolutions."""
    first, second, third = widths
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(channels, first, 5, padding=2),
        "conv1_relu": nn.ReLU(),
        "pool1": nn.AvgPool2d(2),
        "conv2": nn.Conv2d(first, second, 5),
        "conv2_relu": nn.ReLU(),
        "pool2": nn.AvgPool2d(2),
        "conv3": nn.Conv2d(second, third, 5),
        "conv3_relu": nn.ReLU(),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(third, hidden),
        "fc1_relu": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))


def audio_trunk(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions with ReLU and max-pooling by 2: ``conv1``, ``conv1_relu``, ``pool1``, ..."""
    layers: dict[str, nn.Module] = {}
    for number, width in enumerate(widths, start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
        layers[f"conv{number}_relu"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels = width
    return nn.Sequential(OrderedDict(layers))
