"""Distillation from a stronger teacher, DIST (Huang, You, Wang, Qian, Xu; NeurIPS 2022).

A strong teacher's probabilities are hard to match exactly; DIST asks only for their linear
correlation, over the classes of each sample and over the samples of each class
(arXiv 2205.10536, equations 9-11):

    L = CE + tau^2 * (beta * inter + gamma * intra)
    inter = 1 - mean_n rho(p_s[n, :], p_t[n, :]),   intra = 1 - mean_c rho(p_s[:, c], p_t[:, c])

with p = softmax(z / tau) ``(B, C)`` and Pearson's rho. Dense logits ``(B, ..., C)`` are flattened
to one row per position, and only positions that count take part. beta and gamma are 2, the paper's
as recalled; the authors' code for segmentation and other code bases have 1. ``intra`` sees the
batch of one process; it does not look across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.divergence import mean_over
from kdrun.losses.precision import full_precision
from kdrun.losses.relations import pearson_distance
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive


@full_precision
def inter_and_intra(
    student: Tensor, teacher: Tensor, *, temperature: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pearson distances of class distributions: mean over positions, and mean over classes.

    Both are zero where nothing counts.

    Args:
        student: logits ``(..., C)``.
        teacher: logits ``(..., C)``.
        temperature: tau, which softens both distributions.
        mask: ``(...)``, true at the positions that count.
    """
    ours = F.softmax(student.flatten(0, -2) / temperature, dim=1)
    theirs = F.softmax(teacher.flatten(0, -2) / temperature, dim=1)
    if mask is None:
        inter = pearson_distance(ours, theirs, dim=1).mean()
        return inter, pearson_distance(ours, theirs, dim=0).mean()
    counted = mask.flatten().bool()
    inter = mean_over(pearson_distance(ours, theirs, dim=1), counted)
    ours, theirs = _mean_elsewhere(ours, counted), _mean_elsewhere(theirs, counted)
    classes = counted.any().expand(ours.shape[1])
    return inter, mean_over(pearson_distance(ours, theirs, dim=0), classes)


def _mean_elsewhere(values: Tensor, counted: Tensor) -> Tensor:
    """Rows that do not count, at the mean of those that do: a correlation over rows is blind to
    them, and no shape depends on how many there are."""
    rows = counted.unsqueeze(1)
    mean = torch.where(rows, values, 0).sum(dim=0) / counted.sum().clamp(min=1)
    return torch.where(rows, values, mean)


class DIST(Method):
    """Match class probabilities up to positive affine maps, by sample and by class.

    Args:
        temperature: tau, which softens both distributions.
        beta: factor of the correlation over classes.
        gamma: factor of the correlation over samples.
        supervised_weight: factor of the task's own loss.
    """

    tasks = ("classification", "language_modelling")
    relational = True
    zero_at_equality = True

    def __init__(
        self,
        *,
        temperature: Positive = 4.0,
        beta: NonNegative = 2.0,
        gamma: NonNegative = 2.0,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.beta = beta
        self.gamma = gamma
        self.supervised_weight = supervised_weight

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and both correlation distances, without tau^2."""
        inter, intra = inter_and_intra(
            student.logits,
            teachers["teacher"].logits,
            temperature=self.temperature,
            mask=batch.mask,
        )
        supervised = self.supervised_loss(student, batch)
        return {"supervised": supervised, "inter": inter, "intra": intra}

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors, tau^2 included."""
        return {
            "supervised": self.supervised_weight,
            "inter": self.temperature**2 * self.beta,
            "intra": self.temperature**2 * self.gamma,
        }
