"""A multi-layer perceptron, for tables and for tiny images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from kdrun.parameters import PositiveInt, ProperFraction


class MLP(nn.Module):
    """Linear layers with ReLU between them; the input is flattened.

    Args:
        num_classes: outputs of the classifier.
        input_shape: shape of one sample.
        hidden: width of each hidden layer.
        dropout: after each hidden layer.

    Taps: ``stage1`` ... are the hidden layers after ReLU and dropout, ``(B, width)``.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        input_shape: Sequence[PositiveInt],
        hidden: Sequence[PositiveInt] = (256, 256),
        dropout: ProperFraction = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        width = math.prod(input_shape)
        for hidden_width in hidden:
            layer = nn.Sequential(nn.Linear(width, hidden_width), nn.ReLU(inplace=True))
            if dropout:
                layer.append(nn.Dropout(dropout))
            self.layers.append(layer)
            width = hidden_width
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Samples ``(B, *input_shape)`` to logits ``(B, num_classes)``."""
        return self.classifier(self.layers(x.flatten(1)))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {}
        for index in range(len(self.layers)):
            points[f"stage{index + 1}"] = f"layers.{index}"
            points[f"stage{index + 1}.preactivation"] = f"input:layers.{index}.1"
        return points | {"penultimate": "input:classifier"}
