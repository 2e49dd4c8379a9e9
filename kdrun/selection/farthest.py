"""Farthest-first traversal (k-centre greedy), in any distance."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Distance = Callable[[Tensor], Tensor]
"""From one point ``(D,)`` to every row of the pool, ``(N,)``."""


def euclidean_to(pool: Tensor) -> Distance:
    """Euclidean distances to the rows of ``pool`` ``(N, D)``, in float32.

    Differences are taken before squares: the shortcut by a matrix product loses the digits that
    decide between near neighbours.
    """
    pool = pool.float()
    return lambda point: (pool - point.float()).square().sum(dim=-1).sqrt()


def cosine_to(pool: Tensor) -> Distance:
    """``1 - cos`` to the rows of ``pool`` ``(N, D)``; 1 to and from a zero vector."""
    pool = torch.nn.functional.normalize(pool.float(), dim=-1)

    def distance(point: Tensor) -> Tensor:
        return 1 - pool @ torch.nn.functional.normalize(point.float(), dim=-1)

    return distance


def nearest_distance(size: int, centres: Iterable[Tensor], distance: Distance) -> Tensor:
    """Distance ``(N,)`` of each of ``size`` rows from the nearest of the centres; infinite where
    there are none."""
    nearest = torch.full((size,), torch.inf)
    for centre in centres:
        nearest = torch.minimum(nearest, distance(centre).to(nearest.device))
    return nearest


def farthest_first(
    pool: Tensor, centres: Iterable[Tensor], count: int, distance: Distance
) -> tuple[Tensor, Tensor]:
    """Choose, again and again, the row that is farthest from all centres and all chosen rows.

    One vector of nearest distances is kept and updated, so a choice costs N distances.

    Args:
        pool: ``(N, D)``; rows become centres as they are chosen.
        centres: points ``(D,)`` to begin with; without any, the first row is chosen first.
        count: how many rows, at most N.
        distance: from a point to all rows of the pool.

    Returns:
        The rows in order, and the distance of each from what there was before it, ``(count,)``,
        which never rises.

    Raises:
        ValueError: more rows are asked for than there are.
    """
    check_count(count, len(pool))
    nearest = nearest_distance(len(pool), centres, distance)
    chosen, radii = [], []
    for _ in range(count):
        row = int(nearest.argmax())
        chosen.append(row)
        radii.append(float(nearest[row]))
        nearest = torch.minimum(nearest, distance(pool[row]).to(nearest.device))
        nearest[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(radii)


def check_count(count: int, size: int) -> None:
    """Refuse to choose more than there is.

    Raises:
        ValueError: ``count`` is not between 0 and ``size``.
    """
    if not 0 <= count <= size:
        raise ValueError(f"cannot choose {count} of {size} samples")
