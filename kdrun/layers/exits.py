"""Exits: small networks that predict the classes from the features of one stage.

The two kinds are those of OFA-KD (Hao et al., NeurIPS 2023), for maps and for tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdrun.layers.taps import attach

HEADS = 4
"""Attention heads of the blocks of a token exit."""


def convolutional_exit(channels: int, *, halvings: int, width: int, classes: int) -> nn.Sequential:
    """An exit from a map ``(B, C, H, W)``: separable convolutions, global average, classifier.

    Each of ``halvings`` blocks halves the map and doubles the channels, but the last gives
    ``width`` of them. With none, a 1x1 convolution leads from the channels to ``width``.

    Args:
        channels: of the map.
        halvings: how often the map is halved.
        width: channels before the classifier.
        classes: outputs.
    """
    if halvings == 0:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 1)]
    else:
        widths = [channels * 2**step for step in range(halvings)] + [width]
        layers = [separable_halving(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    exit_branch = nn.Sequential(*layers, *pooling, nn.Linear(width, classes))
    _initialize(exit_branch)
    return exit_branch


def separable_halving(channels: int, channels_out: int) -> nn.Sequential:
    """Two depthwise-separable 3x3 convolutions, the first of stride 2; no biases."""

    def half(channels_out: int, stride: int) -> tuple[nn.Module, ...]:
        return (
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )

    return nn.Sequential(*half(channels, 2), *half(channels_out, 1))


class PatchMerging(nn.Module):
    """Join 2x2 neighbouring tokens into one: ``(B, g * g, C)`` to ``(B, g * g / 4, width)``.

    Args:
        grid: g, the side of the square of tokens; even.
        channels: of a token.
        width: of a joined token.
        activation: after the projection.
    """

    def __init__(self, grid: int, channels: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * channels)
        self.projection = nn.Linear(4 * channels, width, bias=False)
        self.activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        """Neighbours are concatenated in the order: upper left, lower left, upper right, lower
        right."""
        square = tokens.unflatten(1, (self.grid, self.grid))
        parts = [square[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.activation(self.projection(self.norm(torch.cat(parts, dim=-1).flatten(1, 2))))


class TokenExit(nn.Module):
    """An exit from tokens ``(B, S + g * g, C)``: patch merging, transformer blocks, classifier.

    The S special tokens in front pass around the merging. The classifier reads the first of them,
    or the mean over all tokens where there is none.

    Args:
        grid: g, the side of the square of patch tokens.
        special: S.
        channels: C.
        width: of the blocks.
        final_grid: patches are merged while the square stays at least this wide.
        depth: number of transformer blocks.
        classes: outputs.

    Raises:
        ValueError: a grid that cannot be halved, or tokens of another width that are not merged.
    """

    def __init__(
        self,
        *,
        grid: int,
        special: int,
        channels: int,
        width: int,
        final_grid: int,
        depth: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.special = special
        merges = max(int(math.log2(grid / final_grid)), 0)
        if grid % 2**merges:
            raise ValueError(
                f"a grid of {grid}x{grid} patches cannot be halved {merges} times; choose another "
                "final_grid"
            )
        if channels != width and (special or not merges):
            raise ValueError(
                f"an exit of width {width} cannot read tokens of width {channels} "
                + ("beside special tokens" if special else f"on a grid of {grid}x{grid}")
            )
        if width % HEADS:
            raise ValueError(f"an exit of width {width} cannot have {HEADS} attention heads")
        self.merging = nn.Sequential()
        for number in range(merges):
            is_plain_last = 0 < number == merges - 1
            activation = nn.Identity() if is_plain_last else nn.GELU()
            read = width if number else channels
            self.merging.append(PatchMerging(grid // 2**number, read, width, activation))
        self.blocks = nn.Sequential(*(_block(width) for _ in range(depth)))
        self.classifier = nn.Linear(width, classes)
        _initialize(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        if not self.special:
            return self.classifier(self.blocks(self.merging(tokens)).mean(dim=1))
        special, patches = tokens[:, : self.special], tokens[:, self.special :]
        tokens = self.blocks(torch.cat([special, self.merging(patches)], dim=1))
        return self.classifier(tokens[:, 0])


class ExitedNetwork(nn.Module):
    """A network that is left by one of its exits.

    Args:
        network: the whole network.
        location: where the exit reads: ``path`` of a sub-module, or ``input:<path>``.
        form: from what stands there to what the exit reads.
        exit_branch: the exit.
    """

    def __init__(
        self,
        network: nn.Module,
        location: str,
        form: Callable[[Tensor], Tensor],
        exit_branch: nn.Module,
    ) -> None:
        super().__init__()
        self.network, self.exit_branch = network, exit_branch
        self._form = form
        self._name = location if location.startswith("input:") else f"module:{location}"
        self._taps = attach(network, (self._name,))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the exit."""
        with self._taps:
            self.network(inputs)
        return self.exit_branch(self._form(self._taps.collect()[self._name]))


def _block(width: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        width,
        HEADS,
        dim_feedforward=4 * width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )


def _initialize(network: nn.Module) -> None:
    """Convolutions He-normal with fan out, linear layers truncated normal of 0.02, zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
            nn.init.zeros_(module.in_proj_bias)
        else:
            continue
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
