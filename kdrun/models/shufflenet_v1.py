"""ShuffleNet V1 for small images, as in the knowledge-distillation benchmarks.

Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
CVPR 2018, with three groups. The 32-pixel form has a 1x1 stem of stride 1 and no pooling behind it,
a ReLU after the depthwise convolution (the paper has none), and bottlenecks of a quarter of the
channels that the convolutions of the block give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdrun.models.channel_shuffle import channel_shuffle
from kdrun.parameters import PositiveInt

STEM_WIDTH = 24


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3 and grouped 1x1 convolutions; ReLU after the sum.

    With stride 2 the average-pooled input is concatenated instead of added, so ``in_channels`` of
    the ``out_channels`` are its own.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, groups: int, first_groups: int
    ) -> None:
        super().__init__()
        self.stride, self.first_groups = stride, first_groups
        residual = out_channels - in_channels if stride == 2 else out_channels
        width = residual // 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, residual, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(residual)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / stride, W / stride)``."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = channel_shuffle(residual, self.first_groups)
        residual = self.relu2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        if self.stride == 1:
            return self.relu(residual + x)
        pooled = functional.avg_pool2d(x, 3, stride=2, padding=1)
        return self.relu(torch.cat([residual, pooled], dim=1))


class ShuffleNetV1(nn.Module):
    """Three stages of shuffle units, each of which halves the map.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        widths: output channels of each stage.
        blocks: units in each stage.
        groups: groups of the 1x1 convolutions (one in the first convolution, which reads the stem).

    Taps: ``stem`` and stages after the ReLU; ``.preactivation`` is the sum or concatenation before.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 3,
        widths: Sequence[PositiveInt] = (240, 480, 960),
        blocks: Sequence[PositiveInt] = (4, 8, 4),
        groups: PositiveInt = 3,
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(f"blocks {list(blocks)} and widths {list(widths)} differ in length")
        self.blocks = tuple(blocks)
        self.conv1 = nn.Conv2d(in_channels, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.relu = nn.ReLU(inplace=True)
        channels = STEM_WIDTH
        for number, (depth, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            layer = nn.Sequential()
            for index in range(depth):
                first_groups = 1 if number == 1 and index == 0 else groups
                stride = 2 if index == 0 else 1
                layer.append(ShuffleUnit(channels, width, stride, groups, first_groups))
                channels = width
            self.add_module(f"layer{number}", layer)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        for number in range(1, len(self.blocks) + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.linear(self.pool(x).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {"stem": "relu", "stem.preactivation": "input:relu", "stem.norm": "bn1"}
        for number, depth in enumerate(self.blocks, start=1):
            points[f"stage{number}"] = f"layer{number}"
            points[f"stage{number}.preactivation"] = f"input:layer{number}.{depth - 1}.relu"
        return points | {"penultimate": "input:linear"}
