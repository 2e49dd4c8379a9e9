"""How channels and classes of a network go together, compared between student and teacher.

Distances of DisWOT (Dong et al., CVPR 2023), which judge architectures by networks that were never
trained. ``W (N, C)`` is the classifier of ``N`` classes on ``C`` channels, or the gradient of the
loss at it; maps ``(B, C, H, W)`` are what the classifier's pooling reads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.precision import full_precision
from kdrun.losses.relations import similarity_relation

SMALLEST_NORM = 1e-12


@full_precision
def gradient_affinity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the channel affinities of each class, over ``N C``; in [0, 4].

    For each class with gradient g, the rows of ``g g^T`` are divided by their norms (at least
    1e-12). So neither the scale of a gradient nor the sign of a class's gradient matters. This is
    the semantic distance of the released code; the paper's is ``class_map_distance``.

    Args:
        student: gradients ``(N, C)``.
        teacher: gradients ``(N, C)``.

    Raises:
        ValueError: the numbers of channels or classes differ.
    """
    _same(student, teacher, "the classifiers")
    difference = _row_affinities(student[:, :, None]) - _row_affinities(teacher[:, :, None])
    return difference.square().sum() / student.numel()


@full_precision
def class_map_distance(
    student_weight: Tensor, student_maps: Tensor, teacher_weight: Tensor, teacher_maps: Tensor
) -> Tensor:
    """Distance between the normalised Gram matrices of the class activation maps.

    The maps ``sum_c w_nc A_c`` of class n on all samples are one vector; ``G G^T`` over classes is
    divided by its Frobenius norm, and so is measured the difference. The paper's form of the
    semantic distance, whose text leaves the arrangement open.

    Args:
        student_weight: ``(N, C)``; ``student_maps``: ``(B, C, H, W)``.
        teacher_weight: ``(N, C')``; ``teacher_maps``: ``(B, C', H', W')``.
    """
    grams = []
    for weight, maps in ((student_weight, student_maps), (teacher_weight, teacher_maps)):
        activation = torch.einsum("nc,bchw->nbhw", weight, maps).flatten(1)
        gram = activation @ activation.T
        grams.append(gram / gram.norm().clamp(min=SMALLEST_NORM))
    return (grams[0] - grams[1]).norm()


@full_precision
def channel_affinity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the channel affinities ``A A^T`` of each sample, over ``B C``.

    Rows are divided by their norms. The semantic term of DisWOT's distillation.

    Args:
        student: maps ``(B, C, H, W)``.
        teacher: maps ``(B, C, H', W')``.

    Raises:
        ValueError: the numbers of channels differ.
    """
    _same(student[:, :, 0, 0], teacher[:, :, 0, 0], "the maps")
    difference = _row_affinities(student.flatten(2)) - _row_affinities(teacher.flatten(2))
    return difference.square().sum() / (student.shape[0] * student.shape[1])


def first_sample_channel_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """``similarity_relation`` between the channels of the first sample only.

    What the released code of DisWOT compares in place of samples on one of its search spaces.

    Args:
        student: maps ``(B, C, H, W)``.
        teacher: maps ``(B, C, H', W')``.

    Raises:
        ValueError: the numbers of channels differ.
    """
    _same(student[:, :, 0, 0], teacher[:, :, 0, 0], "the maps")
    return similarity_relation(student[0].flatten(1), teacher[0].flatten(1))


def _row_affinities(vectors: Tensor) -> Tensor:
    """``X X^T`` of each ``(C, D)`` with rows of norm 1."""
    return F.normalize(vectors @ vectors.transpose(1, 2), dim=2, eps=SMALLEST_NORM)


def _same(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what} of student and teacher have {student.shape[1]} and {teacher.shape[1]} "
            "channels; choose networks that end in the same width"
        )
