"""Knowledge distillation by softened logits (Hinton, Vinyals, Dean; NIPS workshop 2014).

The student matches the teacher's class distribution at a temperature T above 1, where the small
probabilities of wrong classes carry the teacher's view of their similarity (arXiv 1503.02531):

    L = supervised_weight * CE(z_s, y) + weight * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))

with logits z ``(..., C)`` and means over samples. The defaults are those of the CIFAR-100
literature; on ImageNet both weights are 0.5 and T is 1. With ``standardize`` both logits are
z-scored first (Sun et al., CVPR 2024; see the method ls).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdrun.losses.divergence import kl_divergence, standardize
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive


class KD(Method):
    """Match the teacher's softened class distribution.

    Args:
        temperature: T, which softens both distributions.
        t_squared: multiply the divergence by T^2.
        standardize: z-score the logits of each sample before the divergence.
        weight: factor of the divergence.
        supervised_weight: factor of the task's own loss.
    """

    tasks = ("classification", "language_modelling")
    zero_at_equality = True

    def __init__(
        self,
        *,
        temperature: Positive = 4.0,
        t_squared: bool = True,
        standardize: bool = False,
        weight: NonNegative = 0.9,
        supervised_weight: NonNegative = 0.1,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.t_squared = t_squared
        self.standardize = standardize
        self.weight = weight
        self.supervised_weight = supervised_weight

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the divergence from the teacher."""
        ours, theirs = student.logits, teachers["teacher"].logits
        if self.standardize:
            ours, theirs = standardize(ours), standardize(theirs)
        divergence = kl_divergence(
            ours,
            theirs,
            temperature=self.temperature,
            t_squared=self.t_squared,
            mask=batch.mask,
        )
        return {"supervised": self.supervised_loss(student, batch), "kd": divergence}

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "kd": self.weight}
