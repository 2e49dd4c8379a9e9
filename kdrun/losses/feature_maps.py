"""Comparing feature maps ``(B, C, H, W)`` of two networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.precision import full_precision


def average_pool(features: Tensor, size: Sequence[int]) -> Tensor:
    """Averages of a map over a grid of cells: the values of ``adaptive_avg_pool2d``.

    The gradient of that function differs from run to run on CUDA, so PyTorch refuses it where
    determinism is asked for; the gradient of this one does not.

    Args:
        features: ``(B, C, H, W)``.
        size: cells along height and width; more than there are positions repeat them.

    Returns:
        ``(B, C, *size)``.
    """
    height, width = features.shape[-2:]
    rows, columns = size
    if height % rows == 0 and width % columns == 0:
        return F.avg_pool2d(features, (height // rows, width // columns))
    return _average_cells(_average_cells(features, rows, dim=2), columns, dim=3)


def _average_cells(features: Tensor, cells: int, dim: int) -> Tensor:
    """Averages over ``cells`` intervals of one dimension, which overlap where they must."""
    length = features.shape[dim]
    starts = [cell * length // cells for cell in range(cells)]
    ends = [-(-(cell + 1) * length // cells) for cell in range(cells)]
    means = [
        features.narrow(dim, start, end - start).mean(dim)
        for start, end in zip(starts, ends, strict=True)
    ]
    return torch.stack(means, dim)


def pool_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the map of larger height so that both have the same spatial size.

    Args:
        student: ``(B, C, H, W)``.
        teacher: ``(B, C', H', W')``.
    """
    if student.shape[-2:] == teacher.shape[-2:]:
        return student, teacher
    if student.shape[-2] > teacher.shape[-2]:
        return average_pool(student, teacher.shape[-2:]), teacher
    return student, average_pool(teacher, student.shape[-2:])


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Where a layer looks: ``mean_c |f_c|^power`` per position, each sample scaled to unit norm.

    Zagoruyko and Komodakis, ICLR 2017, section 3.1 (activation-based, sum of powers; the mean
    differs from the sum by a factor that the norm removes).

    Args:
        features: ``(B, C, H, W)``.
        power: exponent of the activations.

    Returns:
        ``(B, H * W)``.
    """
    return F.normalize(features.abs().pow(power).mean(dim=1).flatten(1), dim=1)


@full_precision
def attention_distance(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """Squared difference of two attention maps, mean over samples and positions.

    Args:
        student: ``(B, C, H, W)``.
        teacher: ``(B, C', H', W')``; the larger map is average-pooled to the smaller.
        power: exponent of the activations.
    """
    student, teacher = pool_to_smaller(student, teacher)
    return F.mse_loss(attention_map(student, power), attention_map(teacher, power))


@full_precision
def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``(student - teacher)^2``, mean over every entry of two tensors of one shape."""
    return F.mse_loss(student, teacher)


@full_precision
def selectivity_discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps, mean over samples.

    Huang and Wang, arXiv 1707.01219: a channel is its activations over space, scaled to unit norm;
    the kernel is ``(a . b)^2``, averaged over all pairs of channels (a channel with itself
    included).

    Args:
        student: ``(B, C, H, W)``.
        teacher: ``(B, C', H', W')``; the larger map is average-pooled to the smaller.
    """
    student, teacher = pool_to_smaller(student, teacher)
    student = F.normalize(student.flatten(2), dim=2)
    teacher = F.normalize(teacher.flatten(2), dim=2)
    return (
        _mean_square_product(student, student)
        + _mean_square_product(teacher, teacher)
        - 2 * _mean_square_product(student, teacher)
    )


def _mean_square_product(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.transpose(1, 2)).square().mean()


@full_precision
def gaussian_negative_log_likelihood(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """``(mean - target)^2 / (2 variance) + log(variance) / 2``, mean over every entry, in nats.

    The constant ``log(2 pi) / 2`` is left out.

    Args:
        mean: ``(B, C, H, W)``.
        target: the same shape.
        variance: positive, of a shape that broadcasts to it.
    """
    return 0.5 * ((mean - target).square() / variance + variance.log()).mean()


@full_precision
def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error at several spatial resolutions, the coarser ones weighted less.

    Chen et al., CVPR 2021, section 3.4: the full map counts 1, its averages over 4x4, 2x2 and 1x1
    cells count 1/2, 1/4, 1/8 as far as they are smaller than the map (a skipped one does not use up
    a weight), over the sum of the weights. Mean over all entries of each resolution.

    Args:
        student: ``(B, C, H, W)``.
        teacher: the same shape.
    """
    losses, weights = [F.mse_loss(student, teacher)], [1.0]
    for cells in (4, 2, 1):
        if cells < student.shape[2]:
            coarse = (average_pool(features, (cells, cells)) for features in (student, teacher))
            losses.append(F.mse_loss(*coarse))
            weights.append(weights[-1] / 2)
    weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)


def negative_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Expected value of the negative part of a batch-normalised channel.

    Heo et al., ICCV 2019, equation 6: batch norm gives a channel about the distribution
    ``N(bias, weight^2)``, whose mean below zero this is. Where less than 0.1% lies below zero,
    three standard deviations below zero stand in for it, as in the official code.

    Args:
        weight: ``(C,)``, the scale of the batch norm.
        bias: ``(C,)``, its shift.

    Returns:
        ``(C,)``, at most 0.
    """
    deviation = weight.abs().clamp(min=torch.finfo(weight.dtype).tiny)
    ratio = bias / deviation
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(below > 1e-3, bias - deviation * density / below, -3 * deviation)


@full_precision
def partial_squared_error(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Squared distance from the teacher's pre-activations where the ReLU leaves a difference.

    Heo et al., ICCV 2019, equations 3 and 5: teacher values are raised to ``margin``; where the
    raised value is not positive and the student is below it already, nothing is asked.

    Args:
        student: ``(B, C, H, W)``.
        teacher: the same shape.
        margin: ``(C,)``, not positive.

    Returns:
        The sum over channels and positions, mean over samples.
    """
    target = torch.maximum(teacher, margin[:, None, None])
    asked = (student > target) | (target > 0)
    return torch.where(asked, (student - target).square(), 0).sum() / len(student)
