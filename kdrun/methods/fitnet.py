"""FitNets: hints for thin deep nets (Romero, Ballas, Kahou, Chassang, Gatta, Bengio; ICLR 2015).

A middle layer of the student, through a trained regressor r, predicts the same layer of the teacher
(arXiv 1412.6550, equation 3):

    L = CE + weight * mean((r(f_s) - f_t)^2)

with maps f ``(B, C, H, W)`` and the mean over everything. The paper pre-trains the lower half of
the student on the hint and then distils; the CIFAR-100 literature, followed here, trains once with
both terms. The regressor is trained with the student and does not ship with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdrun.layers.projectors import hint_regressor
from kdrun.losses.feature_maps import mean_squared_error
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, PositiveInt


class FitNet(Method):
    """Regress the teacher's features at one stage.

    Args:
        stage: the stage of both networks that gives the hint, counted from 1.
        weight: factor of the hint term.
        supervised_weight: factor of the task's own loss.
    """

    def __init__(
        self,
        *,
        stage: PositiveInt = 2,
        weight: NonNegative = 100.0,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.tap = f"stage{stage}"
        self.weight = weight
        self.supervised_weight = supervised_weight

    def taps(self) -> Taps:
        """The hint stage of both."""
        return {"student": (self.tap,), "teacher": (self.tap,)}

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build the regressor between the two shapes.

        Raises:
            ValueError: there is none (see ``hint_regressor``).
        """
        self.regressor = hint_regressor(
            student.features[self.tap].shape, teachers["teacher"].features[self.tap].shape
        )

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the squared error of the regressed hint."""
        regressed = self.regressor(student.features[self.tap])
        hint = teachers["teacher"].features[self.tap]
        return {
            "supervised": self.supervised_loss(student, batch),
            "hint": mean_squared_error(regressed, hint),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "hint": self.weight}
