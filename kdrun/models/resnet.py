"""Residual networks for small images: resnet8 ... resnet110, resnet32x4, and CIFAR-stem ResNets.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016: the three-stage networks of
its CIFAR section (depth 6n + 2, n blocks a stage) and the four-stage ones of its ImageNet section
with a 3x3 stem of stride 1 and no pooling. Where a block changes size or width its shortcut is a
1x1 convolution with batch normalisation, as in the code of the knowledge-distillation benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from kdrun.models.initialization import init_convolutions
from kdrun.parameters import PositiveInt


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Projection where the block changes size or width; None: the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ReLU after the sum."""

    expansion: ClassVar[int] = 1
    last_norm: ClassVar[str] = "bn2"

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(residual + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 (to four times the width) beside a shortcut; ReLU after the sum."""

    expansion: ClassVar[int] = 4
    last_norm: ClassVar[str] = "bn3"

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, 4 * width, H / stride, W / stride)``."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.relu2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(residual + shortcut)


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """A residual network with a 3x3 stem of stride 1; every stage but the first halves the map.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        block: ``basic`` (two 3x3 convolutions) or ``bottleneck`` (output four times the width).
        blocks: blocks in each stage; ``[n, n, n]`` is the CIFAR network of depth 6n + 2.
        widths: width of each stage.
        stem_width: channels of the stem.

    Taps: ``stem`` and one stage per layer, after the ReLU; ``.preactivation`` is the sum before it.

    Raises:
        ValueError: ``blocks`` and ``widths`` of different length.
    """

    # The same networks in the released code of the distillation benchmarks use these names.
    parameter_aliases: ClassVar[dict[str, str]] = {
        r"\.shortcut\.": ".downsample.",
        r"^linear\.": "fc.",
    }

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 3,
        block: Literal["basic", "bottleneck"] = "basic",
        blocks: Sequence[PositiveInt] = (3, 3, 3),
        widths: Sequence[PositiveInt] = (16, 32, 64),
        stem_width: PositiveInt = 16,
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(f"blocks {list(blocks)} and widths {list(widths)} differ in length")
        self.block = BLOCKS[block]
        self.blocks = tuple(blocks)
        self.conv1 = nn.Conv2d(in_channels, stem_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.relu = nn.ReLU(inplace=True)
        channels = stem_width
        for number, (depth, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            layer = nn.Sequential()
            for index in range(depth):
                stride = 2 if index == 0 and number > 1 else 1
                layer.append(self.block(channels, width, stride))
                channels = width * self.block.expansion
            self.add_module(f"layer{number}", layer)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        for number in range(1, len(self.blocks) + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(self.pool(x).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {"stem": "relu", "stem.preactivation": "input:relu", "stem.norm": "bn1"}
        for number, depth in enumerate(self.blocks, start=1):
            last = f"layer{number}.{depth - 1}"
            points[f"stage{number}"] = f"layer{number}"
            points[f"stage{number}.preactivation"] = f"input:{last}.relu"
            points[f"stage{number}.norm"] = f"{last}.{self.block.last_norm}"
        return points | {"penultimate": "input:fc"}
