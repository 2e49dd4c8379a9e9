"""Which logits of a sequence a loss compares: label words, some tokens, a few of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kdrun.outputs import Batch

MOST_LABEL_WORDS = 64
"""More first tokens than that are running text, not names of classes."""


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


def responses(batches: Iterable[Batch]) -> Iterator[list[int]]:
    """The target tokens that count of each row, where there are any.

    Args:
        batches: with targets and mask ``(B, L)``.

    Raises:
        ValueError: a batch has no mask.
    """
    for batch in batches:
        if batch.mask is None:
            raise ValueError("label words: nothing marks where responses begin")
        for target, counted in zip(batch.target.cpu(), batch.mask.bool().cpu(), strict=True):
            tokens = target[counted].tolist()
            if tokens:
                yield tokens


def find_label_words(batches: Iterable[Batch]) -> Tensor:
    """The tokens that responses begin with, in rising order.

    Each must stand for one class: responses that begin alike must be the same, or one of them the
    other cut short.

    Args:
        batches: with targets and mask ``(B, L)``.

    Raises:
        ValueError: they stand for no classes, or nothing marks the responses.
    """
    longest: dict[int, list[int]] = {}
    for response in responses(batches):
        known = longest.setdefault(response[0], response)
        short, long = sorted((known, response), key=len)
        if long[: len(short)] != short:
            raise ValueError(
                f"label words: different responses begin with the token {response[0]}, so it "
                "stands for no class; choose words that differ in their first token, another "
                "tokenizer, or give label_words"
            )
        longest[response[0]] = long
    if not 2 <= len(longest) <= MOST_LABEL_WORDS:
        raise ValueError(
            f"label words: responses begin with {len(longest)} different tokens, which are no "
            "classes; give label_words"
        )
    return torch.tensor(sorted(longest))
