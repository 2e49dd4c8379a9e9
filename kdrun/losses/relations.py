"""Comparing how the samples of a batch relate to each other in student and teacher.

Features are vectors ``(B, D)``; widths of student and teacher may differ.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.divergence import mean_over
from kdrun.losses.precision import full_precision


@full_precision
def relative_distances(features: Tensor) -> Tensor:
    """Euclidean distances between all samples, divided by their mean.

    Park et al., CVPR 2019, equations 4-6. The mean is over positive distances only, so the diagonal
    does not count, which is exactly 0. Squares are clamped at 1e-12 before the root, which keeps
    the gradient finite; so two equal samples count with a distance of 1e-6, as in the released
    code.

    Args:
        features: ``(B, D)``.

    Returns:
        ``(B, B)``.
    """
    square = features.square().sum(dim=1)
    squared = square[:, None] + square[None, :] - 2 * features @ features.T
    itself = features.new_ones(len(features), dtype=bool).diag()
    distances = squared.clamp(min=1e-12).sqrt().masked_fill(itself, 0)
    positive = distances > 0
    mean = distances.sum() / positive.sum().clamp(min=1)
    # A single sample has no distance; it must not become 0 / 0.
    return distances / mean.clamp(min=1e-12)


@full_precision
def angles(features: Tensor) -> Tensor:
    """Cosine of the angle at sample i between samples j and k, for every triple.

    Park et al., CVPR 2019, equations 7-8. Entries with a coinciding pair are 0 and have no
    gradient: nothing says in which direction such a pair should part.

    Args:
        features: ``(B, D)``.

    Returns:
        ``(B, B, B)``, the vertex i first.
    """
    differences = features[None, :, :] - features[:, None, :]
    coincide = (differences == 0).all(dim=2, keepdim=True)
    directions = F.normalize(differences, dim=2).masked_fill(coincide, 0)
    return directions @ directions.transpose(1, 2)


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 (beta 1) between relative distances, mean over all ``B^2`` entries."""
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 (beta 1) between angles, mean over all ``B^3`` entries, zeros included."""
    return F.smooth_l1_loss(angles(student), angles(teacher))


@full_precision
def similarity_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the row-normalised similarity matrices, over ``B^2``.

    Tung and Mori, ICCV 2019, equations 2-4: the rows of ``F F^T`` have unit norm each.

    Args:
        student: ``(B, D)`` or maps ``(B, C, H, W)``, which are flattened.
        teacher: ``(B, D')`` or maps.
    """
    similarities = [
        F.normalize(features @ features.T, dim=1)
        for features in (student.flatten(1), teacher.flatten(1))
    ]
    return F.mse_loss(*similarities)


@full_precision
def probabilistic_relation(student: Tensor, teacher: Tensor, *, epsilon: float = 1e-7) -> Tensor:
    """Divergence between the conditional probabilities of samples given another sample.

    Passalis and Tefas, ECCV 2018: cosine similarities are shifted to [0, 1] and each row is scaled
    to sum 1, diagonal included; the divergence is ``P_t log(P_t / P_s)``, mean over all ``B^2``
    entries as in the authors' code.

    Args:
        student: ``(B, D)``.
        teacher: ``(B, D')``.
        epsilon: added to norms and to probabilities under the logarithm.
    """
    ours, theirs = (_conditional(features, epsilon) for features in (student, teacher))
    return (theirs * ((theirs + epsilon) / (ours + epsilon)).log()).mean()


def _conditional(features: Tensor, epsilon: float) -> Tensor:
    features = features / (features.norm(dim=1, keepdim=True) + epsilon)
    similarity = (1 + features @ features.T) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


@full_precision
def neighbour_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum_d |D_i||D_i+1|`` with ``D = student - teacher``, mean over neighbouring rows i.

    The form that correlation congruence (Peng et al., ICCV 2019) has in the CIFAR-100 benchmarks.
    Zero for a single row.

    Args:
        student: embeddings ``(B, D)``.
        teacher: embeddings ``(B, D)``.
    """
    difference = (student - teacher).abs()
    products = (difference[:-1] * difference[1:]).sum(dim=1)
    return products.sum() / max(len(products), 1)


@full_precision
def pearson_distance(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """1 minus the Pearson correlation along ``dim``, for every slice.

    1e-8 is added to the product of the norms of the centred vectors; so constant vectors are at
    distance 1.

    Args:
        student: any shape.
        teacher: the same shape.
        dim: the dimension along which is correlated; it is gone from the result.
    """
    ours = student - student.mean(dim=dim, keepdim=True)
    theirs = teacher - teacher.mean(dim=dim, keepdim=True)
    norms = ours.norm(dim=dim) * theirs.norm(dim=dim)
    return 1 - (ours * theirs).sum(dim=dim) / (norms + 1e-8)


@full_precision
def correlation_difference(
    student: Tensor, teacher: Tensor, *, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Squared difference of the Gram matrices ``P P^T`` of class distributions.

    Jin et al., CVPR 2023, equations 7 and 10: summed over a row of the difference, mean over rows.

    Args:
        student: logits ``(B, C)``.
        teacher: logits ``(B, C)``.
        temperature: softens both distributions.
        mask: ``(B,)``, the rows over which the mean is taken; None: all.
    """
    ours, theirs = ((z / temperature).softmax(dim=1) for z in (student, teacher))
    return _gram_difference(ours, theirs, mask)


@full_precision
def class_correlation_difference(
    student: Tensor, teacher: Tensor, *, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """As ``correlation_difference``, of the matrices ``P^T P`` over classes; mask ``(C,)``."""
    ours, theirs = ((z / temperature).softmax(dim=1).T for z in (student, teacher))
    return _gram_difference(ours, theirs, mask)


def _gram_difference(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    difference = teacher @ teacher.T - student @ student.T
    return mean_over(difference.square().sum(dim=1), mask)
