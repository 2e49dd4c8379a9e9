"""Losses over large vocabularies whose logits never exist all at once.

With 8,192 tokens and 131,072 classes one tensor of logits is 4 GiB, and a divergence written
plainly keeps several of that size. Where networks hand over the input of their last layer instead
(``kdrun.outputs.HeadLogits``), a loss that is a mean over positions is computed a few positions at
a time: their logits, their loss, and at once their share of the gradient with respect to that input
and to the layer. What stays is the gradient of the input, of the layer, and one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.precision import full_precision
from kdrun.outputs import HeadLogits

PerPosition = Callable[[Tensor, Tensor], Tensor]
"""Logits of student and teacher ``(N, C)`` in fp32 to values ``(N, K)``, the first of which is the
loss of the position; the others are diagnostics."""


def mean_over_positions(
    per_position: PerPosition,
    student: Tensor | HeadLogits,
    teacher: Tensor | HeadLogits,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Means of ``per_position`` over the positions that count; zeros where none does.

    The gradient is that of the first mean, with respect to the student's logits, or to the input
    and weights of its last layer. The result does not depend on how many positions are computed at
    once, which ``HeadLogits.chunk`` says.

    Args:
        per_position: see ``PerPosition``.
        student: logits ``(..., C)``.
        teacher: logits ``(..., C)``; no gradient flows to them.
        mask: ``(...)``, true at the positions that count.

    Returns:
        ``(K,)``.
    """
    if isinstance(student, HeadLogits) and isinstance(teacher, HeadLogits):
        return _of_heads(per_position, student, teacher, mask)
    ours = student.dense() if isinstance(student, HeadLogits) else student
    theirs = teacher.dense() if isinstance(teacher, HeadLogits) else teacher
    return _of_logits(ours, theirs, per_position, mask)


@full_precision
def _of_logits(
    student: Tensor, teacher: Tensor, per_position: PerPosition, mask: Tensor | None
) -> Tensor:
    values = per_position(student.flatten(0, -2), teacher.detach().flatten(0, -2))
    if mask is None:
        return values.mean(dim=0)
    counted = mask.flatten().bool()
    chosen = torch.where(counted.unsqueeze(-1), values, 0)
    return chosen.sum(dim=0) / counted.sum().clamp(min=1)


def _of_heads(
    per_position: PerPosition, student: HeadLogits, teacher: HeadLogits, mask: Tensor | None
) -> Tensor:
    hidden = student.hidden.flatten(0, -2)
    counted = hidden.new_ones(len(hidden), dtype=torch.float32)
    if mask is not None:
        counted = mask.flatten().float()
    return _ChunkedMean.apply(
        hidden,
        student.weight,
        student.bias,
        teacher.hidden.detach().flatten(0, -2),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        counted / counted.sum().clamp(min=1),
        per_position,
        student.chunk,
    )


class _ChunkedMean(torch.autograd.Function):
    """Weighted sum over positions; gradients are made along the way and wait for backward."""

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        share: Tensor,
        per_position: PerPosition,
        chunk: int,
    ) -> Tensor:
        wanted = [context.needs_input_grad[i] for i in range(3)]
        gradients = [
            torch.zeros_like(value) if wants else None
            for value, wants in zip((hidden, weight, bias), wanted, strict=True)
        ]
        totals = []
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            theirs = _logits(teacher_hidden[rows], teacher_weight, teacher_bias)
            leaves = [
                None if leaf is None else leaf.detach().requires_grad_(wants)
                for leaf, wants in zip((hidden[rows], weight, bias), wanted, strict=True)
            ]
            with torch.enable_grad():
                values = per_position(_logits(*leaves), theirs) * share[rows].unsqueeze(-1)
                loss, sums = values[:, 0].sum(), values.sum(dim=0).detach()
            totals.append(sums)
            if not any(wanted):
                continue
            parts = torch.autograd.grad(
                loss, [leaf for leaf, wants in zip(leaves, wanted, strict=True) if wants]
            )
            into = [gradients[0] if gradients[0] is None else gradients[0][rows], *gradients[1:]]
            for gradient, part in zip((g for g in into if g is not None), parts, strict=True):
                gradient.add_(part)
        context.save_for_backward(*(g for g in gradients if g is not None))
        context.wanted = wanted
        return torch.stack(totals).sum(dim=0)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(context.saved_tensors)
        found = [next(saved) * gradient[0] if wants else None for wants in context.wanted]
        return (*found, *(None,) * 6)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in fp32 or wider; the product itself in the precision of ``hidden``."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = F.linear(hidden, weight.to(hidden.dtype), bias)
    return logits if logits.dtype == torch.float64 else logits.float()
