"""Entropic optimal transport between two clouds of points, and between two of distributions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.precision import full_precision


@full_precision
def pairwise_l1(first: Tensor, second: Tensor) -> Tensor:
    """``sum_d |first_nd - second_md|`` for every pair, without an ``(N, M, D)`` intermediate.

    The gradient is the sign of the difference, 0 where two coordinates tie.

    Args:
        first: ``(..., N, D)``.
        second: ``(..., M, D)``.

    Returns:
        ``(..., N, M)``.
    """
    return torch.cdist(first, second, p=1.0)


@full_precision
def sinkhorn_plan(cost: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Scale ``exp(-cost / epsilon)`` to rows, then columns, that sum to 1, ``iterations`` times.

    Sinkhorn-Knopp (Cuturi 2013) in the log domain, which stays finite where the kernel itself
    underflows. Both marginals are ones, so the plan of a square cost has total mass N, not 1.
    The last step is over columns: their sums are exact, those of the rows converge. Gradients
    flow through every iteration.

    Args:
        cost: ``(..., N, M)``, N points of one cloud against M of the other.
        epsilon: strength of the entropic regularisation, in units of the cost.
        iterations: pairs of row and column steps.

    Returns:
        The transport plan ``(..., N, M)``.
    """
    log_plan = -cost / epsilon
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(dim=-1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(dim=-2, keepdim=True)
    return log_plan.exp()


def counted_costs(cost: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Costs under which points that do not count take no part in a plan.

    Such a point may only be transported onto itself, for nothing; the others only onto each other.
    Their rows and columns are then scaled as if they were alone.

    Args:
        cost: ``(..., N, N)``.
        counted: ``(..., N)``, true at the points that count, of both clouds alike.

    Returns:
        The costs for ``sinkhorn_plan``, and ``(..., N, N)``, true where both points count.
    """
    pairs = counted.unsqueeze(-1) & counted.unsqueeze(-2)
    itself = torch.eye(cost.shape[-1], dtype=torch.bool, device=cost.device)
    allowed = cost.masked_fill(~pairs, torch.inf)
    return allowed.masked_fill(itself & ~pairs, 0.0), pairs


@full_precision
def transport_of_distributions(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    epsilon: float,
    iterations: int,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Transport a batch of student distributions onto the teacher's.

    Moving one onto another costs their L1 distance (Cui et al., LREC-COLING 2024, SinKD).

    Args:
        student: logits ``(..., B, C)``.
        teacher: logits ``(..., B, C)``.
        temperature: tau, which softens both distributions.
        epsilon: strength of the entropic regularisation.
        iterations: pairs of row and column steps.
        counted: ``(..., B)``, true at the samples that take part; None: all do.

    Returns:
        The plan ``(..., B, B)``, whose mass is the number of samples that take part, and the cost
        it was made for, within [0, 2]; row i is a student sample, column j a teacher sample.
    """
    cost = pairwise_l1(
        F.softmax(student / temperature, dim=-1), F.softmax(teacher / temperature, dim=-1)
    )
    if counted is None:
        return sinkhorn_plan(cost, epsilon=epsilon, iterations=iterations), cost
    allowed, pairs = counted_costs(cost, counted)
    plan = sinkhorn_plan(allowed, epsilon=epsilon, iterations=iterations)
    return plan.masked_fill(~pairs, 0.0), cost


@full_precision
def samplewise_distance(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """``sum_c |softmax(student / tau)_c - softmax(teacher / tau)_c|`` of each sample.

    What transport costs where each sample may only go to itself.

    Args:
        student: logits ``(..., C)``.
        teacher: logits ``(..., C)``.
        temperature: tau, which softens both distributions.

    Returns:
        ``(...)``, within [0, 2].
    """
    ours = F.softmax(student / temperature, dim=-1)
    theirs = F.softmax(teacher / temperature, dim=-1)
    return (ours - theirs).abs().sum(dim=-1)
