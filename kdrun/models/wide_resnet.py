"""Wide residual networks (pre-activation): wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, without dropout. Where a block changes
size or width, both its convolutions and its shortcut (a bare 1x1 convolution) read the activated
input, as in the code of the knowledge-distillation benchmarks. One of them gets its pre-activations
by evaluating three normalisations a second time, which moves their running statistics twice a step;
here a tap reads what the forward has computed anyway.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kdrun.models.initialization import init_convolutions
from kdrun.parameters import PositiveInt


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice beside a shortcut; nothing follows the sum."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != width:
            self.shortcut = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        activated = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """A three-stage network of ``depth`` = 6n + 4 with widths 16k, 32k and 64k.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        depth: number of convolutions along the deepest path, 6n + 4.
        widening: the factor k.

    Taps: ``stem`` and stages are raw sums; ``.preactivation`` of a stage is the normalisation that
    the next block (or the head) applies to it.

    Raises:
        ValueError: ``depth`` is not 6n + 4.
    """

    # The same networks in the released code of the distillation benchmarks use these names.
    parameter_aliases: ClassVar[dict[str, str]] = {
        r"^(block\d)\.layer\.": r"\1.",
        r"\.convShortcut\.": ".shortcut.",
    }

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 3,
        depth: PositiveInt = 16,
        widening: PositiveInt = 2,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth of a wide residual network must be 6n + 4, not {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _stage(blocks, 16, 16 * widening, stride=1)
        self.block2 = _stage(blocks, 16 * widening, 32 * widening, stride=2)
        self.block3 = _stage(blocks, 32 * widening, 64 * widening, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widening)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * widening, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return self.fc(self.pool(x).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {}
        for name, stage, reader in (
            ("stem", "conv1", "block1.0."),
            ("stage1", "block1", "block2.0."),
            ("stage2", "block2", "block3.0."),
        ):
            points[name] = stage
            points[f"{name}.preactivation"] = f"input:{reader}relu1"
            points[f"{name}.norm"] = f"{reader}bn1"
        last = {"stage3": "block3", "stage3.preactivation": "input:relu", "stage3.norm": "bn1"}
        return points | last | {"penultimate": "input:fc"}


def _stage(blocks: int, in_channels: int, width: int, stride: int) -> nn.Sequential:
    rest = [PreActivationBlock(width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(PreActivationBlock(in_channels, width, stride), *rest)
