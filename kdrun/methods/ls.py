"""Logit standardization in knowledge distillation (Sun, Ren, Li, Wang, Cao; CVPR 2024).

A shared temperature asks the student to copy the teacher's shift and scale of logits. Standardised
logits free it from both (arXiv 2403.01427, algorithm 1):

    z -> (z - mean(z)) / (std(z) + 1e-7)     per sample over classes, std unbiased

before the divergence of any logit method, here kd, dkd or mlld, with a base temperature of 2 and
the distillation terms multiplied by ``weight``. The paper tunes both for each pair of networks
(temperature 2 to 4, weight 6 to 18). With mlld the class and batch levels keep the plain logits, as
in the authors' code. What a base sees across ranks is said there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from kdrun.method import Method
from kdrun.methods.dkd import DKD
from kdrun.methods.kd import KD
from kdrun.methods.mlld import MLLD
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive, PositiveInt


class LS(Method):
    """A logit method on standardised logits.

    Args:
        base: the logit method.
        temperature: T of the base.
        weight: factor of the base's distillation terms; of dkd, of both alpha and beta.
        supervised_weight: factor of the task's own loss; None: 1 for dkd and 0.1 for the others.
        alpha: factor of dkd's target-class term, before ``weight``.
        beta: factor of dkd's non-target-class term, before ``weight``.
        warmup_epochs: of dkd.
    """

    zero_at_equality = True

    def __init__(
        self,
        *,
        base: Literal["kd", "dkd", "mlld"] = "kd",
        temperature: Positive = 2.0,
        weight: NonNegative = 9.0,
        supervised_weight: NonNegative | None = None,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 8.0,
        warmup_epochs: PositiveInt = 20,
    ) -> None:
        super().__init__()
        if supervised_weight is None:
            supervised_weight = 1.0 if base == "dkd" else 0.1
        common = {
            "temperature": temperature,
            "standardize": True,
            "supervised_weight": supervised_weight,
        }
        if base == "kd":
            self.base = KD(weight=weight, **common)
        elif base == "mlld":
            self.base = MLLD(weight=weight, **common)
        else:
            self.base = DKD(
                alpha=weight * alpha, beta=weight * beta, warmup_epochs=warmup_epochs, **common
            )
        self.relational, self.views = self.base.relational, self.base.views

    def inspect(self, batches: Iterable[Batch]) -> None:
        """Refuse what the base refuses."""
        self.base.inspect(batches)

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Set up the base, which trains for the same task."""
        self.base.supervised_loss = self.supervised_loss
        self.base.setup(student, teachers)

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The terms of the base."""
        return self.base.losses(student, teachers, batch, progress)

    def weights(self, progress: Progress) -> dict[str, float]:
        """The factors of the base."""
        return self.base.weights(progress)
