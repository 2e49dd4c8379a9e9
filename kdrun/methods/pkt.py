"""Probabilistic knowledge transfer (Passalis, Tefas; ECCV 2018).

The student matches how probable the teacher finds one sample as a neighbour of another
(arXiv 1803.10837, equations 3-7, with the cosine kernel):

    L = CE + weight * mean_ij P_t,ij log(P_t,ij / P_s,ij)
    P_ij = (1 + cos(v_i, v_j)) / sum_k (1 + cos(v_i, v_k))

with penultimate vectors v ``(B, D)``; widths may differ. The paper sums over pairs, its code takes
the mean over all B^2, which the weight belongs to. The loss sees the batch of one process; it does
not look across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdrun.losses.relations import probabilistic_relation
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative


class PKT(Method):
    """Match the conditional probabilities of neighbours in the batch.

    Args:
        weight: factor of the divergence.
        supervised_weight: factor of the task's own loss.
    """

    relational = True
    zero_at_equality = True

    def __init__(
        self, *, weight: NonNegative = 30000.0, supervised_weight: NonNegative = 1.0
    ) -> None:
        super().__init__()
        self.weight = weight
        self.supervised_weight = supervised_weight

    def taps(self) -> Taps:
        """Penultimate vectors of both."""
        return {"student": ("penultimate",), "teacher": ("penultimate",)}

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the divergence of the neighbour probabilities."""
        ours = student.features["penultimate"]
        theirs = teachers["teacher"].features["penultimate"]
        return {
            "supervised": self.supervised_loss(student, batch),
            "neighbours": probabilistic_relation(ours, theirs),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "neighbours": self.weight}
