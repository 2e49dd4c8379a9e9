"""Relational knowledge distillation (Park, Kim, Lu, Cho; CVPR 2019).

Not a sample's representation is transferred but the structure of the batch: distances of pairs and
angles of triples of penultimate vectors v ``(B, D)``, so widths may differ (arXiv 1904.05068):

    L = CE + distance_weight * SmoothL1(d_s, d_t) + angle_weight * SmoothL1(a_s, a_t)

d is the distance matrix over its mean positive entry, a the cosines at every vertex. The loss sees
the batch of one process; it does not look across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdrun.losses.relations import angle_relation, distance_relation
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative


class RKD(Method):
    """Match distances and angles between the samples of a batch.

    Args:
        distance_weight: factor of the distance term.
        angle_weight: factor of the angle term.
        supervised_weight: factor of the task's own loss.
    """

    relational = True
    zero_at_equality = True

    def __init__(
        self,
        *,
        distance_weight: NonNegative = 25.0,
        angle_weight: NonNegative = 50.0,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
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
        """The supervised loss, the distance and the angle term."""
        ours = student.features["penultimate"]
        theirs = teachers["teacher"].features["penultimate"]
        return {
            "supervised": self.supervised_loss(student, batch),
            "distance": distance_relation(ours, theirs),
            "angle": angle_relation(ours, theirs),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {
            "supervised": self.supervised_weight,
            "distance": self.distance_weight,
            "angle": self.angle_weight,
        }
