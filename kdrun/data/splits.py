"""Which samples belong to which part: validation, fewer classes, few-shot, long tail.

Every function takes the class ids ``target`` ``(N,)`` and gives row numbers in ascending order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrun.data.seeding import stream


def stratified(target: Tensor, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Choose ``count`` rows with the classes in the proportions of the whole.

    Each class gives its exact share rounded down; the largest remainders get the rest.

    Returns:
        The chosen rows and the others.

    Raises:
        ValueError: if ``count`` is not between 0 and the number of rows.
    """
    size = target.shape[0]
    if not 0 <= count <= size:
        raise ValueError(f"cannot choose {count} of {size} samples")
    per_class = torch.bincount(target)
    exact = per_class.double() * count / max(size, 1)
    share = exact.floor().long()
    missing = count - int(share.sum())
    share[(exact - share).argsort(descending=True, stable=True)[:missing]] += 1
    return _take(target, share, seed)


def per_class(target: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """``count`` rows of every class (class-balanced few-shot).

    Raises:
        ValueError: if a class has fewer; the message names it.
    """
    available = torch.bincount(target)
    if int(available.min()) < count:
        poorest = int(available.argmin())
        raise ValueError(f"class {poorest} has {int(available[poorest])} samples, not {count}")
    return _take(target, torch.full_like(available, count), seed)[0]


def long_tail(target: Tensor, imbalance: float, *, seed: int = 0) -> Tensor:
    """Rows whose class sizes fall exponentially from class 0 to the last.

    Class ``c`` of ``C`` keeps ``n * imbalance ** (-c / (C - 1))`` of its samples, ``n`` being the
    size of the largest class, so the first class is ``imbalance`` times the last one (Cui et al.,
    Class-Balanced Loss, CVPR 2019, section 5.1).
    """
    available = torch.bincount(target)
    classes = available.shape[0]
    decay = torch.arange(classes, dtype=torch.float64) / max(classes - 1, 1)
    share = (available.max() * imbalance**-decay).floor().long().clamp_(min=1)
    return _take(target, torch.minimum(share, available), seed)[0]


def keep_classes(target: Tensor, classes: list[int], total: int) -> tuple[Tensor, Tensor]:
    """The rows of the given classes, and their class ids renumbered in the order given.

    Args:
        target: class ids in [0, total).
        classes: the ids to keep.
        total: number of classes there are.
    """
    renumbered = torch.full((total,), -1, dtype=torch.int64)
    renumbered[torch.tensor(classes)] = torch.arange(len(classes))
    new_target = renumbered[target]
    rows = (new_target >= 0).nonzero().flatten()
    return rows, new_target[rows]


def _take(target: Tensor, share: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """``share[c]`` random rows of each class ``c``, and the remaining rows."""
    shuffled = torch.randperm(target.shape[0], generator=stream(seed))
    by_class = shuffled[target[shuffled].argsort(stable=True)]
    sizes = torch.bincount(target, minlength=share.shape[0])
    place = torch.arange(target.shape[0]) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    chosen = place < share.repeat_interleave(sizes)
    return by_class[chosen].sort().values, by_class[~chosen].sort().values
