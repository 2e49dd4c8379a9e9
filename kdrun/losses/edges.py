"""Losses over the edges of a graph: what neighbours' predictions share and how they differ.

A graph has ``N`` nodes; ``edge_index`` is ``(2, E)``, one column for each directed edge. Both
directions of an edge are listed, so it does not matter which row is called the source.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.divergence import kl_divergence, mean_over
from kdrun.losses.precision import full_precision


@full_precision
def neighbour_divergence(student: Tensor, teacher: Tensor, edge_index: Tensor) -> Tensor:
    """``KL(softmax(teacher_j) || softmax(student_i))`` in nats, mean over edges (i, j) and nodes.

    Every student node matches the teacher at its neighbours and at itself: each node counts as one
    edge to itself, once, whether or not the graph lists it (Wu et al., AAAI 2023, low-frequency
    term). It is not zero where student and teacher agree, unless neighbours agree too; in a graph
    without edges it is the divergence node by node.

    Args:
        student: logits ``(N, C)``.
        teacher: logits ``(N, C)``.
        edge_index: ``(2, E)`` node numbers.
    """
    itself = torch.arange(len(student), device=edge_index.device)
    ends = torch.cat([edge_index, itself.expand(2, -1)], dim=1)
    counted = torch.cat([_between_nodes(edge_index), torch.ones_like(itself, dtype=torch.bool)])
    return kl_divergence(student[ends[0]], teacher[ends[1]], t_squared=False, mask=counted)


@full_precision
def difference_divergence(
    student: Tensor, teacher: Tensor, edge_index: Tensor, *, temperature: float
) -> Tensor:
    """Divergence between the distributions made of ``|z_i - z_j|``, in nats, mean over edges.

    ``KL(softmax(|z^t_i - z^t_j| / T) || softmax(|z^s_i - z^s_j| / T))`` with the absolute
    differences taken class by class on raw logits, and without a factor T^2 (Wu et al., AAAI 2023,
    high-frequency term). Edges from a node to itself do not count; without any edge it is 0.

    Args:
        student: logits ``(N, C)``.
        teacher: logits ``(N, C)``.
        edge_index: ``(2, E)`` node numbers.
        temperature: T, which softens both distributions.
    """
    ours, theirs = (
        (logits[edge_index[0]] - logits[edge_index[1]]).abs() for logits in (student, teacher)
    )
    return kl_divergence(
        ours,
        theirs,
        temperature=temperature,
        t_squared=False,
        mask=_between_nodes(edge_index),
    )


@full_precision
def neighbour_similarity(values: Tensor, edge_index: Tensor) -> Tensor:
    """Cosine of the vectors of two neighbours, mean over edges between different nodes.

    Args:
        values: ``(N, D)``.
        edge_index: ``(2, E)`` node numbers.
    """
    cosine = F.cosine_similarity(values[edge_index[0]], values[edge_index[1]], dim=-1)
    return mean_over(cosine, _between_nodes(edge_index))


@full_precision
def frequency_parts(values: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """The low- and the high-frequency part of a signal on the nodes; they add up to it.

    ``(X + A X) / 2`` and ``(X - A X) / 2`` with A the adjacency matrix divided by the square roots
    of both nodes' degrees, without edges of a node to itself; these are the spectral filters with
    responses ``1 - lambda / 2`` and ``lambda / 2``. A node without neighbours has ``A X = 0``.

    Args:
        values: ``(N, D)``.
        edge_index: ``(2, E)`` node numbers, both directions of each edge.
    """
    source, target = edge_index
    weight = _between_nodes(edge_index).to(values.dtype)
    degree = values.new_zeros(len(values)).index_add_(0, target, weight)
    scale = degree.clamp(min=1).rsqrt()
    weight = (weight * scale[source] * scale[target]).unsqueeze(1)
    smooth = torch.zeros_like(values).index_add_(0, target, values[source] * weight)
    return (values + smooth) / 2, (values - smooth) / 2


def _between_nodes(edge_index: Tensor) -> Tensor:
    """``(E,)``, false where an edge leads from a node to itself."""
    return edge_index[0] != edge_index[1]
