"""MobileNetV2 for small images, at half width as the knowledge-distillation benchmarks use it.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018. Their 32-pixel
form differs from the paper: ReLU in place of ReLU6, stride 1 in the second group, an expansion
convolution in the first block too, and 1280 channels before the classifier at any width up to 1.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kdrun.models.initialization import init_classifier, init_convolutions
from kdrun.parameters import Positive, PositiveInt

GROUPS = (
    # expands, channels, blocks, stride
    (False, 16, 1, 1),
    (True, 24, 2, 1),
    (True, 32, 3, 2),
    (True, 64, 4, 2),
    (True, 96, 3, 1),
    (True, 160, 3, 2),
    (True, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / stride, W / stride)``."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Seven groups of inverted residuals behind a stem of stride 2; 32 pixels end as a 2x2 map.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        width: factor on all channels but the last 1280 (which only grow, above 1).
        expansion: factor between a bottleneck and the depthwise convolution inside it.

    Taps: ``stem`` after its ReLU. A stage is a linear bottleneck, which no ReLU follows: it is its
    own pre-activation, which lets OFD and ReviewKD read it in a student. There is no batch norm to
    say what a ReLU would hide, so it cannot be a teacher of OFD.
    """

    # The same network in the released code of the distillation benchmarks uses this name.
    parameter_aliases: ClassVar[dict[str, str]] = {r"^classifier\.0\.": "classifier."}

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 3,
        width: Positive = 0.5,
        expansion: PositiveInt = 6,
    ) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = _convolution(in_channels, channels, kernel_size=3, stride=2)
        self.blocks = nn.Sequential()
        for expands, base_width, count, first_stride in GROUPS:
            group = nn.Sequential()
            for index in range(count):
                stride = first_stride if index == 0 else 1
                out_channels = int(base_width * width)
                factor = expansion if expands else 1
                group.append(InvertedResidual(channels, out_channels, stride, factor))
                channels = out_channels
            self.blocks.append(group)
        last = int(1280 * max(width, 1.0))
        self.conv2 = _convolution(channels, last, kernel_size=1, stride=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)
        init_convolutions(self)
        init_classifier(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(self.pool(x).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are: the bottlenecks of groups 2, 3, 5 and 7."""
        points = {"stem": "conv1", "stem.preactivation": "input:conv1.2", "stem.norm": "conv1.1"}
        for stage, group in enumerate((1, 2, 4, 6), start=1):
            points[f"stage{stage}"] = points[f"stage{stage}.preactivation"] = f"blocks.{group}"
        return points | {"penultimate": "input:classifier"}


def _convolution(
    in_channels: int, out_channels: int, *, kernel_size: int, stride: int
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
