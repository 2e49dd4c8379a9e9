"""Small networks on images and spectrograms, one alone or both: for runs that must end in minutes.

Every part is a plain convolutional trunk; the trunks of a network that reads several inputs are
joined before its linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdrun.parameters import PositiveInt


class ConvNet(nn.Module):
    """Convolutions, two linear layers and a classifier, for one input.

    Args:
        num_classes: outputs of the classifier.
        input_shape: of one sample, ``(C, H, W)``.
        widths: channels of the 3x3 convolutions, each followed by ReLU and max-pooling by 2.
        hidden: widths of the linear layers.

    Taps: the stages are the linear layers after their ReLU.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        input_shape: Sequence[PositiveInt],
        widths: Sequence[PositiveInt] = (16, 32),
        hidden: Sequence[PositiveInt] = (64, 48),
    ) -> None:
        super().__init__()
        self.trunk = trunk(input_shape[0], widths)
        self.head = head(features(input_shape, widths), hidden)
        self.classifier = nn.Linear(hidden[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        return self.classifier(self.head(self.trunk(x)))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        return head_taps(self.head)


class FusionNet(nn.Module):
    """A trunk for each input, joined before two linear layers and a classifier.

    Args:
        num_classes: outputs of the classifier.
        input_shape: of one sample, by the input's name.
        widths: channels of each trunk's convolutions.
        hidden: widths of the linear layers.

    Taps: the stages are the linear layers after their ReLU.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        input_shape: Mapping[str, Sequence[PositiveInt]],
        widths: Sequence[PositiveInt] = (16, 32),
        hidden: Sequence[PositiveInt] = (64, 48),
    ) -> None:
        super().__init__()
        if not isinstance(input_shape, Mapping):
            raise ValueError("FusionNet reads several inputs by name, this data set has one")
        self.trunks = nn.ModuleDict(
            {name: trunk(shape[0], widths) for name, shape in input_shape.items()}
        )
        self.head = head(sum(features(shape, widths) for shape in input_shape.values()), hidden)
        self.classifier = nn.Linear(hidden[-1], num_classes)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Inputs ``(B, C, H, W)`` by name to logits ``(B, num_classes)``."""
        joined = torch.cat([run(inputs[name]) for name, run in self.trunks.items()], dim=1)
        return self.classifier(self.head(joined))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        return head_taps(self.head)


def trunk(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions, each with ReLU and max-pooling by 2, to vectors."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten())


def features(shape: Sequence[int], widths: Sequence[int]) -> int:
    """Length of the vector that ``trunk`` gives."""
    return widths[-1] * math.prod(side // 2 ** len(widths) for side in shape[1:])


def head(width: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU: modules 0, 2, ... and 1, 3, ..."""
    layers: list[nn.Module] = []
    for hidden_width in hidden:
        layers += [nn.Linear(width, hidden_width), nn.ReLU()]
        width = hidden_width
    return nn.Sequential(*layers)


def head_taps(layers: nn.Sequential) -> dict[str, str]:
    """The taps of a network that ends in ``head`` and ``classifier``."""
    points = {}
    for number in range(len(layers) // 2):
        points[f"stage{number + 1}"] = f"head.{2 * number + 1}"
        points[f"stage{number + 1}.preactivation"] = f"head.{2 * number}"
    return points | {"penultimate": "input:classifier"}
