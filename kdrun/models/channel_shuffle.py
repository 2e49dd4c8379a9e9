"""The operation that gives the ShuffleNets their name."""

from __future__ import annotations

from torch import Tensor


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave ``groups`` equal groups of channels of ``x`` ``(B, C, H, W)``.

    Channel j of group i moves to place ``j * groups + i``.
    """
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
