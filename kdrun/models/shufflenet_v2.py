"""ShuffleNet V2 for small images, as in the knowledge-distillation benchmarks.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018,
at width 1. The 32-pixel form has a 1x1 stem of stride 1 and no pooling behind it.

The last ReLU of a unit is applied after concatenation and shuffle rather than on one branch before:
the kept half is already non-negative, so the result is the same, and the pre-activation of a stage
has its channels in the order of the stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdrun.models.channel_shuffle import channel_shuffle
from kdrun.parameters import PositiveInt

STEM_WIDTH = 24


class BasicUnit(nn.Module):
    """Half of the channels pass; the other half goes through 1x1, depthwise 3x3 and 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same shape."""
        kept, x = x.chunk(2, dim=1)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn3(self.conv3(self.bn2(self.conv2(x))))
        return self.relu(channel_shuffle(torch.cat([kept, x], dim=1), groups=2))


class DownUnit(nn.Module):
    """Two branches with a depthwise 3x3 convolution of stride 2, concatenated."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        # first branch: depthwise, pointwise
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        # second branch: pointwise, depthwise, pointwise
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / 2, W / 2)``."""
        first = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        second = self.relu3(self.bn3(self.conv3(x)))
        second = self.bn5(self.conv5(self.bn4(self.conv4(second))))
        return self.relu(channel_shuffle(torch.cat([first, second], dim=1), groups=2))


class ShuffleNetV2(nn.Module):
    """Three stages of one down unit and some basic units, then a 1x1 convolution.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        widths: output channels of each stage; even.
        blocks: basic units in each stage, after the down unit.
        last_width: channels of the last convolution, the pooled width.

    Taps: ``stem`` and stages after the ReLU; ``.preactivation`` is what that ReLU reads.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 3,
        widths: Sequence[PositiveInt] = (116, 232, 464),
        blocks: Sequence[PositiveInt] = (3, 7, 3),
        last_width: PositiveInt = 1024,
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(f"blocks {list(blocks)} and widths {list(widths)} differ in length")
        self.blocks = tuple(blocks)
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.relu1 = nn.ReLU(inplace=True)
        channels = STEM_WIDTH
        for number, (depth, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            units = [BasicUnit(width) for _ in range(depth)]
            self.add_module(f"layer{number}", nn.Sequential(DownUnit(channels, width), *units))
            channels = width
        self.conv2 = nn.Conv2d(channels, last_width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last_width)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(last_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.relu1(self.bn1(self.conv1(x)))
        for number in range(1, len(self.blocks) + 1):
            x = getattr(self, f"layer{number}")(x)
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.pool(x).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {"stem": "relu1", "stem.preactivation": "input:relu1", "stem.norm": "bn1"}
        for number, depth in enumerate(self.blocks, start=1):
            points[f"stage{number}"] = f"layer{number}"
            points[f"stage{number}.preactivation"] = f"input:layer{number}.{depth}.relu"
        return points | {"penultimate": "input:linear"}
