"""Which logits of sequences are the points of a loss that compares clouds of them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kdrun.losses.sequence import drawn_positions, first_counted, likeliest_classes

Points = Literal["samples", "label_words", "tokens", "tokens_per_sequence"]


def choose_points(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    points: Points,
    label_words: Tensor | None = None,
    tokens_at_most: int = 256,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of the points of both networks, and which of these count (None: all).

    Args:
        student: logits ``(B, C)`` with ``samples``, else ``(B, L, C)``.
        teacher: the same shape.
        mask: ``(B,)`` or ``(B, L)``, true at the positions that count; None: all do.
        points: ``samples``: the logits as they are. ``label_words``: those of the label words at
            the first position of each sequence that counts ``(B, W)``. ``tokens``: positions of
            the whole batch ``(N, C)``. ``tokens_per_sequence``: positions ``(B, L, C)``.
        label_words: W class ids.
        tokens_at_most: N with ``tokens``; where more count, as many are drawn.
        top_k: with tokens, the number of classes that are kept, those that the teacher finds
            likeliest in the batch; None: all.
    """
    if points == "samples":
        return student, teacher, mask
    if mask is None:
        mask = student.new_ones(student.shape[:-1]).bool()
    if points == "label_words":
        student, teacher = first_counted(student, mask), first_counted(teacher, mask)
        return student[:, label_words], teacher[:, label_words], None
    if top_k is not None:
        classes = likeliest_classes(teacher.flatten(0, 1), mask.flatten(), top_k)
        student, teacher = student[..., classes], teacher[..., classes]
    if points == "tokens_per_sequence":
        return student, teacher, mask
    rows, counted = drawn_positions(mask.flatten(), tokens_at_most)
    return student.flatten(0, 1)[rows], teacher.flatten(0, 1)[rows], counted
