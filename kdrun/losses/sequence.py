"""Which logits of a sequence a loss compares: label words, some tokens, a few of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def first_counted(values: Tensor, mask: Tensor) -> Tensor:
    """The values at the first position of each row that counts.

    Args:
        values: ``(B, L, ...)``.
        mask: ``(B, L)``, true at the positions that count; a row without one gives its first.

    Returns:
        ``(B, ...)``.
    """
    place = mask.int().argmax(dim=1)
    return values[torch.arange(len(values), device=values.device), place]


def drawn_positions(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most ``count`` of the positions that count, all equally likely, without replacement.

    Args:
        mask: ``(N,)``, true at the positions that count.
        count: how many are drawn where there are more.

    Returns:
        Their numbers ``(min(N, count),)``, and which of these count: where fewer do, others fill
        up. All positions in order, and no draw, where ``count`` is at least N.
    """
    size = mask.shape[0]
    if count >= size:
        return torch.arange(size, device=mask.device), mask
    scores = torch.rand(size, device=mask.device) + mask
    chosen = scores.topk(count).indices
    return chosen, mask[chosen]


def likeliest_classes(teacher: Tensor, mask: Tensor, count: int) -> Tensor:
    """The classes to which the teacher gives most probability, summed over positions that count.

    Args:
        teacher: logits ``(N, C)``.
        mask: ``(N,)``, true at the positions that count.
        count: how many classes, at most C.

    Returns:
        Class ids ``(count,)``.
    """
    mass = teacher.float().softmax(dim=-1) * mask.unsqueeze(-1)
    return mass.sum(dim=0).topk(min(count, teacher.shape[-1])).indices
