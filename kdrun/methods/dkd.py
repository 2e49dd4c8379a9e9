"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang; CVPR 2022).

The KL divergence of KD splits into a part about the target class (TCKD) and one about the
distribution among all other classes (NCKD), which KD weights by the teacher's doubt and so
suppresses where the teacher is sure (arXiv 2203.08679, equation 7). Here both have free weights:

    L = CE(z_s, y) + min(epoch / warmup, 1) * (alpha * TCKD + beta * NCKD)

with the epoch counted from 1 and both terms multiplied by T^2, as in the official code. With
``standardize`` both logits are z-scored first (Sun et al., CVPR 2024; see the method ls).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from kdrun.losses.divergence import decoupled_divergence, standardize
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive, PositiveInt


class DKD(Method):
    """Weigh the target-class and the non-target-class knowledge separately.

    Args:
        temperature: T, which softens both distributions.
        standardize: z-score the logits of each sample before the divergence.
        alpha: factor of the target-class term.
        beta: factor of the non-target-class term; the paper tunes it per pair of networks.
        warmup_epochs: epochs over which both factors rise linearly to full size.
        supervised_weight: factor of the task's own loss.
    """

    tasks = ("classification", "language_modelling")
    zero_at_equality = True

    def __init__(
        self,
        *,
        temperature: Positive = 4.0,
        standardize: bool = False,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 8.0,
        warmup_epochs: PositiveInt = 20,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.standardize = standardize
        self.alpha = alpha
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.supervised_weight = supervised_weight

    def inspect(self, batches: Iterable[Batch]) -> None:
        """Refuse targets that are no class ids, such as those of mixed samples."""
        if next(iter(batches)).target.is_floating_point():
            raise ValueError("mixed samples have no one target class: mixup and CutMix must be off")

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss, the target-class and the non-target-class divergence."""
        ours, theirs = student.logits, teachers["teacher"].logits
        if self.standardize:
            ours, theirs = standardize(ours), standardize(theirs)
        target_class, non_target_class = decoupled_divergence(
            ours,
            theirs,
            batch.target,
            temperature=self.temperature,
            t_squared=True,
            mask=batch.mask,
        )
        return {
            "supervised": self.supervised_loss(student, batch),
            "target_class": target_class,
            "non_target_class": non_target_class,
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Factors that rise over the warm-up."""
        warmup = min((progress.epoch + 1) / self.warmup_epochs, 1.0)
        return {
            "supervised": self.supervised_weight,
            "target_class": warmup * self.alpha,
            "non_target_class": warmup * self.beta,
        }
