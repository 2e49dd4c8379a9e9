"""Multi-level logit distillation (Jin, Wang, Lin; CVPR 2023).

Logits are matched at five temperatures and on three levels, on a weakly and a strongly augmented
view of each sample:

    instance: sum_T T^2 KL_T(z_t || z_s)
    class:    sum_T ||P_t^T P_t - P_s^T P_s||_F^2 / C      P = softmax(z / T)  (B, C)
    batch:    sum_T ||P_t P_t^T - P_s P_s^T||_F^2 / B
    L = supervised_weight * (CE_weak + CE_strong) + weight * (instance + class + batch)

On the weak view only samples count on which the teacher is unsure (its largest probability is at
most the batch's median), and only classes whose summed teacher probability is at most the median.

``variant: code`` follows the released code, whose numbers are published: a mask multiplies the
reduced scalar, so it acts as a factor of about one half; on the strong view only T, 3 and 5 are
used, with the weak view at 2 and 6 in their place; class and batch level are not used on the strong
view. ``variant: paper`` masks each sample and class, and uses all levels and temperatures on both
views. Levels above the instance see the batch of one process; they do not look across ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from kdrun.losses.divergence import kl_divergence, standardize
from kdrun.losses.precision import full_precision
from kdrun.losses.relations import class_correlation_difference, correlation_difference
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive

Level = Callable[..., Tensor]
"""A loss of logits ``(B, C)`` of student and teacher, a temperature and a mask."""


class MLLD(Method):
    """Match logits at several temperatures, by sample, by class and by batch.

    Args:
        variant: ``code`` or ``paper``; see the head of this module.
        temperature: T, the first of the five temperatures; the others are 3, 5, 2 and 6.
        standardize: z-score the logits of each sample on the instance level (see the method ls).
        weight: factor of the three levels.
        supervised_weight: factor of the task's own loss on each view.
    """

    relational = True
    zero_at_equality = True
    views = ("strong",)

    def __init__(
        self,
        *,
        variant: Literal["code", "paper"] = "code",
        temperature: Positive = 4.0,
        standardize: bool = False,
        weight: NonNegative = 0.9,
        supervised_weight: NonNegative = 0.1,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.temperatures = (temperature, 3.0, 5.0, 2.0, 6.0)
        self.standardize = standardize
        self.weight = weight
        self.supervised_weight = supervised_weight

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Refuse logits that are not ``(B, C)``."""
        if student.logits.ndim != 2:
            raise ValueError(f"it compares logits (B, C), got {tuple(student.logits.shape)}")

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss on both views and the three levels."""
        teacher = teachers["teacher"]
        weak = student.logits, teacher.logits
        strong = student.views["strong"].logits, teacher.views["strong"].logits
        samples, classes = unsure(teacher.logits)
        return {
            "supervised": self.supervised_loss(student, batch),
            "supervised_strong": self.supervised_loss(student.views["strong"], batch),
            "instance": self._instances(weak, strong, samples),
            "class": self._correlations(class_correlation_difference, weak, strong, classes),
            "batch": self._correlations(correlation_difference, weak, strong, samples),
        }

    def _instances(
        self, weak: tuple[Tensor, Tensor], strong: tuple[Tensor, Tensor], counted: Tensor
    ) -> Tensor:
        if self.standardize:
            weak = standardize(weak[0]), standardize(weak[1])
            strong = standardize(strong[0]), standardize(strong[1])

        def divergence(
            student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
        ) -> Tensor:
            return kl_divergence(
                student, teacher, temperature=temperature, t_squared=True, mask=mask
            )

        masked = self._masked(divergence, weak, counted)
        if self.variant == "paper":
            return masked + _over(self.temperatures, divergence, strong)
        on_strong = _over(self.temperatures[:3], divergence, strong)
        return masked + on_strong + _over(self.temperatures[3:], divergence, weak)

    def _correlations(
        self,
        level: Level,
        weak: tuple[Tensor, Tensor],
        strong: tuple[Tensor, Tensor],
        counted: Tensor,
    ) -> Tensor:
        masked = self._masked(level, weak, counted)
        if self.variant == "code":
            return masked
        return masked + _over(self.temperatures, level, strong)

    def _masked(self, level: Level, pair: tuple[Tensor, Tensor], counted: Tensor) -> Tensor:
        """Sum over temperatures of the mean over rows, where rows outside ``counted`` are zero."""
        mask = counted if self.variant == "paper" else None
        total = _over(self.temperatures, level, pair, mask=mask)
        return counted.to(total.dtype).mean() * total

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {
            "supervised": self.supervised_weight,
            "supervised_strong": self.supervised_weight,
            "instance": self.weight,
            "class": self.weight,
            "batch": self.weight,
        }


@torch.no_grad()
@full_precision
def unsure(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and classes that count on the weak view.

    Args:
        logits: ``(B, C)`` of the teacher.

    Returns:
        ``(B,)``, true where the largest probability is at most the batch's median, and ``(C,)``,
        true where the class's summed probability is.
    """
    probabilities = logits.softmax(dim=1)
    return _lower_half(probabilities.amax(dim=1)), _lower_half(probabilities.sum(dim=0))


def _over(
    temperatures: Sequence[float],
    level: Level,
    pair: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """Sum of a loss over temperatures."""
    losses = [level(*pair, temperature=temperature, mask=mask) for temperature in temperatures]
    return torch.stack(losses).sum()


def _lower_half(values: Tensor) -> Tensor:
    """Which values are at most the median."""
    return values <= torch.quantile(values, 0.5)
