"""Attention transfer (Zagoruyko, Komodakis; ICLR 2017).

The student looks where the teacher looks: at every stage, the mean squared activation per position,
scaled to unit norm over the map, is matched (arXiv 1612.03928, equation 2):

    L = CE + weight * sum_stages mean((A_s - A_t)^2),   A(f) = normalise(mean_c |f_c|^power)

Maps f ``(B, C, H, W)``; the larger of a pair is average-pooled to the smaller. The mean over
samples and positions, and the weight that belongs to it, follow the CIFAR-100 literature (the
paper's formula has the plain norm). Stages are paired from the deepest one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdrun.layers.stages import paired_stages, require_maps
from kdrun.losses.feature_maps import attention_distance
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive


class AT(Method):
    """Match spatial attention maps of every stage.

    Args:
        power: exponent of the activations, at least 1.
        weight: factor of the sum over stages.
        supervised_weight: factor of the task's own loss.
    """

    zero_at_equality = True

    def __init__(
        self,
        *,
        power: Positive = 2.0,
        weight: NonNegative = 1000.0,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        if power < 1:
            raise ValueError(f"power={power:g} must be at least 1: its gradient at 0 is infinite")
        self.power = power
        self.weight = weight
        self.supervised_weight = supervised_weight

    def taps(self) -> Taps:
        """Maps of all stages."""
        return {"student": ("stages",), "teacher": ("stages",)}

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Refuse networks whose stages give no maps."""
        for pair in paired_stages(student, teachers["teacher"]):
            require_maps(*pair)

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the distance of the attention maps, summed over stages."""
        distances = [
            attention_distance(ours, theirs, power=self.power)
            for ours, theirs in paired_stages(student, teachers["teacher"])
        ]
        return {
            "supervised": self.supervised_loss(student, batch),
            "attention": torch.stack(distances).sum(),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "attention": self.weight}
