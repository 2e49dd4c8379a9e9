"""Similarity-preserving knowledge distillation (Tung, Mori; ICCV 2019).

Pairs of samples that excite similar activations in the teacher shall do so in the student
(arXiv 1907.09682, equation 4):

    L = CE + weight * ||G_s - G_t||_F^2 / B^2,   G = row-wise l2-normalised F F^T

with F ``(B, C * H * W)`` the flattened map of the last stage; widths and sizes may differ. The loss
sees the batch of one process; it does not look across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdrun.layers.stages import stage_features
from kdrun.losses.relations import similarity_relation
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative


class SP(Method):
    """Match the similarity matrix of the batch.

    Args:
        weight: factor of the similarity term.
        supervised_weight: factor of the task's own loss.
    """

    relational = True
    zero_at_equality = True

    def __init__(
        self, *, weight: NonNegative = 3000.0, supervised_weight: NonNegative = 1.0
    ) -> None:
        super().__init__()
        self.weight = weight
        self.supervised_weight = supervised_weight

    def taps(self) -> Taps:
        """The stages of both, of which the last is compared."""
        return {"student": ("stages",), "teacher": ("stages",)}

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the difference of the similarity matrices."""
        ours = stage_features(student)[-1]
        theirs = stage_features(teachers["teacher"])[-1]
        return {
            "supervised": self.supervised_loss(student, batch),
            "similarity": similarity_relation(ours, theirs),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "similarity": self.weight}
