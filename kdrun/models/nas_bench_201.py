"""The networks of NAS-Bench-201 (Dong and Yang, ICLR 2020): one cell, repeated.

A cell has four nodes; node j is the sum of one operation on each node before it, so there are six
operations. Three stages of equal cells, widths 16, 32 and 64, with a residual block of stride 2
between them. A cell is written ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``, the number being the node
that the operation reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from kdrun.models.resnet import BasicBlock
from kdrun.parameters import PositiveInt

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0,), (0, 1), (0, 1, 2))
"""For each node but the first, the nodes it reads."""


def parse_cell(text: str) -> list[str]:
    """The six operations of a cell's string, in the order in which they stand.

    Raises:
        ValueError: it is not the string of a cell.
    """
    nodes = [re.findall(r"\|([^|~]+)~(\d+)", node) for node in text.split("+")]
    if tuple(tuple(int(source) for _, source in node) for node in nodes) != EDGES:
        raise ValueError(f"a cell is |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, got {text}")
    operations = [operation for node in nodes for operation, _ in node]
    if format_cell(operations) != text:
        raise ValueError(f"a cell is |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, got {text}")
    return operations


def format_cell(operations: Sequence[str]) -> str:
    """The string of six operations."""
    rest = iter(operations)
    return "+".join(
        "|" + "".join(f"{next(rest)}~{source}|" for source in sources) for sources in EDGES
    )


class Cell(nn.Module):
    """Four nodes and six operations on maps of one size.

    Args:
        operations: of ``OPERATIONS``.
        width: channels.
    """

    def __init__(self, operations: Sequence[str], width: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(_operation(name, width) for name in operations)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width, H, W)`` to the same shape."""
        nodes, edges = [x], iter(self.edges)
        for sources in EDGES:
            nodes.append(sum(next(edges)(nodes[source]) for source in sources))
        return nodes[-1]


class Zero(nn.Module):
    """The operation ``none``."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros like ``x``."""
        return x * 0


def _operation(name: str, width: int) -> nn.Module:
    if name in ("nor_conv_1x1", "nor_conv_3x3"):
        size = int(name[-1])
        convolution = nn.Conv2d(width, width, size, padding=size // 2, bias=False)
        return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(width))
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.Identity() if name == "skip_connect" else Zero()


class NasBench201(nn.Module):
    """A network of NAS-Bench-201.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        cell: six operations (``none``, ``skip_connect``, ``nor_conv_1x1``, ``nor_conv_3x3``,
            ``avg_pool_3x3``), or the cell's string.
        width: of the first stage; each further one has twice as many channels.
        cells: in each of the three stages.

    Taps: the three stages; the last after the closing normalisation and ReLU.

    Raises:
        ValueError: the cell is none of the space.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 3,
        cell: str | list[str],
        width: PositiveInt = 16,
        cells: PositiveInt = 5,
    ) -> None:
        super().__init__()
        operations = parse_cell(cell) if isinstance(cell, str) else list(cell)
        unknown = [name for name in operations if name not in OPERATIONS]
        if unknown or len(operations) != sum(map(len, EDGES)):
            raise ValueError(f"cell: six of {', '.join(OPERATIONS)}, got {operations}")
        stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width))
        self.stages = nn.ModuleList()
        for number in range(3):
            stage = nn.Sequential()
            if number:
                stage.append(BasicBlock(width, 2 * width, stride=2))
                width *= 2
            for _ in range(cells):
                stage.append(Cell(operations, width))
            self.stages.append(stage)
        self.last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.pool(self.last(x)).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {"stem": "stem", "stage1": "stages.0", "stage2": "stages.1", "stage3": "last"}
        points |= {"stage3.preactivation": "input:last.1", "stage3.norm": "last.0"}
        return points | {"penultimate": "input:fc"}
