"""Correlation congruence for knowledge distillation (Peng, Jin, Liu, Zhou, Wu, Liu; ICCV 2019).

Not only samples but the correlation between them shall be the teacher's (arXiv 1904.01802). In the
form of the CIFAR-100 benchmarks, followed here instead of the paper's kernel matrices, neighbouring
rows i, i + 1 of the batch are compared:

    L = CE + weight * mean_i sum_d |D_id||D_i+1,d|,   D = E_s v_s - E_t v_t

with penultimate vectors v ``(B, D)`` and linear embeddings E into ``dimension``, both trained with
the student. The loss sees the batch of one process; it does not look across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kdrun.losses.relations import neighbour_congruence
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, PositiveInt


class CC(Method):
    """Match the correlation between neighbours in the batch.

    Args:
        dimension: width of the embeddings.
        weight: factor of the congruence term.
        supervised_weight: factor of the task's own loss.
    """

    relational = True
    ordered = True

    def __init__(
        self,
        *,
        dimension: PositiveInt = 128,
        weight: NonNegative = 0.02,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.dimension = dimension
        self.weight = weight
        self.supervised_weight = supervised_weight

    def taps(self) -> Taps:
        """Penultimate vectors of both."""
        return {"student": ("penultimate",), "teacher": ("penultimate",)}

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build both embeddings."""
        width = student.features["penultimate"].shape[1]
        teacher_width = teachers["teacher"].features["penultimate"].shape[1]
        self.student_embedding = nn.Linear(width, self.dimension)
        self.teacher_embedding = nn.Linear(teacher_width, self.dimension)

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the congruence of neighbours."""
        ours = self.student_embedding(student.features["penultimate"])
        theirs = self.teacher_embedding(teachers["teacher"].features["penultimate"])
        return {
            "supervised": self.supervised_loss(student, batch),
            "congruence": neighbour_congruence(ours, theirs),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "congruence": self.weight}
