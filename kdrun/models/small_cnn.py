"""A small plain convolutional network, for runs that must end in seconds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdrun.models.initialization import init_convolutions
from kdrun.parameters import PositiveInt


class SmallCNN(nn.Module):
    """One 3x3 convolution, batch normalisation and ReLU a stage; all but the first halve the map.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        widths: channels of each stage.

    Taps: stages after the ReLU.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 3,
        widths: Sequence[PositiveInt] = (16, 32, 64),
    ) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        channels = in_channels
        for index, width in enumerate(widths):
            stage = nn.Sequential(
                nn.Conv2d(channels, width, 3, stride=min(index + 1, 2), padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            self.stages.append(stage)
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        return self.classifier(self.pool(self.stages(x)).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {}
        for index in range(len(self.stages)):
            name, path = f"stage{index + 1}", f"stages.{index}"
            points[name] = path
            points[f"{name}.preactivation"] = f"input:{path}.2"
            points[f"{name}.norm"] = f"{path}.1"
        return points | {"penultimate": "input:classifier"}
