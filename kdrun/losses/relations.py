"""Comparing how the samples of a batch relate to each other in student and teacher.

Features are vectors ``(B, D)``; widths of student and teacher may differ.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.precision import full_precision


@full_precision
def relative_distances(features: Tensor) -> Tensor:
    """Euclidean distances between all samples, divided by their mean.

    Park et al., CVPR 2019, equation 4-6. The mean is over positive distances only, so neither the
    diagonal nor duplicates count. Squares are clamped at 1e-12 before the root, which keeps the
    gradient finite; the diagonal is exactly 0.

    Args:
        features: ``(B, D)``, B >= 2.

    Returns:
        ``(B, B)``.
    """
    square = features.square().sum(dim=1)
    squared = square[:, None] + square[None, :] - 2 * features @ features.T
    itself = features.new_ones(len(features), dtype=bool).diag()
    distances = squared.clamp(min=1e-12).sqrt().masked_fill(itself, 0)
    positive = distances > 0
    return distances / ((distances * positive).sum() / positive.sum())


@full_precision
def angles(features: Tensor) -> Tensor:
    """Cosine of the angle at sample i between samples j and k, for every triple.

    Park et al., CVPR 2019, equations 7-8. Entries with a coinciding pair are 0.

    Args:
        features: ``(B, D)``.

    Returns:
        ``(B, B, B)``, the vertex i first.
    """
    directions = F.normalize(features[None, :, :] - features[:, None, :], dim=2)
    return directions @ directions.transpose(1, 2)


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 (beta 1) between relative distances, mean over all ``B^2`` entries."""
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 (beta 1) between angles, mean over all ``B^3`` entries, zeros included."""
    return F.smooth_l1_loss(angles(student), angles(teacher))
