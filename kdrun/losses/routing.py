"""Several teachers and a gate: who teaches which sample, and how evenly they are used.

A gate gives each sample a distribution ``(B, N)`` over N teachers. Li et al., ACM Multimedia 2025
(arXiv 2507.07015), choose the k most probable teachers of each sample; the balance losses are those
of mixtures of experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrun.losses.divergence import kl_divergence
from kdrun.losses.precision import full_precision

SMALLEST_SHARE = 1e-8
"""Shares are kept above this, so that a teacher nobody is sent to gives no infinite loss."""


def routed_divergence(
    student: Tensor, teachers: Tensor, chosen: Tensor, *, temperature: float, t_squared: bool
) -> Tensor:
    """``KL(teacher || student)`` in nats, mean over samples and over the teachers of each.

    All chosen teachers count alike, whatever the gate thinks of them.

    Args:
        student: logits ``(B, C)``.
        teachers: logits of all teachers ``(B, N, C)``.
        chosen: ``(B, k)`` numbers of each sample's teachers.
        temperature: T, which softens both distributions.
        t_squared: multiply by T^2.
    """
    rows = chosen.unsqueeze(-1).expand(-1, -1, teachers.shape[-1])
    return kl_divergence(
        student.unsqueeze(1),
        teachers.gather(1, rows),
        temperature=temperature,
        t_squared=t_squared,
    )


def mixed_divergence(
    student: Tensor, teachers: Tensor, gates: Tensor, *, temperature: float, t_squared: bool
) -> Tensor:
    """``KL(mixture || student)`` in nats, mean over samples; the mixture is of logits, by the gate.

    The gradient reaches the gate through the mixture.

    Args:
        student: logits ``(B, C)``.
        teachers: logits ``(B, N, C)``.
        gates: probabilities ``(B, N)``.
        temperature: T, which softens both distributions.
        t_squared: multiply by T^2.
    """
    mixture = torch.einsum("bn,bnc->bc", gates.to(teachers.dtype), teachers)
    return kl_divergence(student, mixture, temperature=temperature, t_squared=t_squared)


def shares(chosen: Tensor, teachers: int) -> Tensor:
    """Part ``(N,)`` of all choices ``(B, k)`` that falls to each teacher; sums to 1."""
    return torch.nn.functional.one_hot(chosen, teachers).float().mean((0, 1))


@full_precision
def balance_divergence(gates: Tensor) -> Tensor:
    """``KL(uniform || mean gate) / N`` in nats: zero where the batch uses all teachers alike.

    The division by N is that of ``F.kl_div(reduction="batchmean")`` on a vector.

    Args:
        gates: probabilities ``(B, N)``.
    """
    teachers = gates.shape[-1]
    share = gates.mean(0).clamp(min=SMALLEST_SHARE)
    return -(share.log() + math.log(teachers)).mean() / teachers


@full_precision
def balance_variation(gates: Tensor) -> Tensor:
    """Coefficient of variation of the teachers' importance, the sum of their gates over the batch.

    The standard deviation is unbiased (N - 1).

    Args:
        gates: probabilities ``(B, N)`` of at least two teachers.
    """
    importance = gates.sum(0)
    return importance.std() / importance.mean()
