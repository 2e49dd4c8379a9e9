"""Neuron selectivity transfer (Huang, Wang; arXiv 2017).

Each channel of a map is a sample of where its neuron is selective; the student matches the
distribution of these patterns by the maximum mean discrepancy (arXiv 1707.01219, equation 6):

    L = CE + weight * sum_stages MMD^2(f_s, f_t)
    MMD^2 = mean_cc' k(s_c, s_c') + mean_cc' k(t_c, t_c') - 2 mean_cc' k(s_c, t_c'),  k = (a . b)^2

with the channels of maps f ``(B, C, H, W)`` flattened over space and scaled to unit norm. The
larger map of a pair is average-pooled; stages are paired from the deepest one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdrun.layers.stages import paired_stages, require_maps
from kdrun.losses.feature_maps import selectivity_discrepancy
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative


class NST(Method):
    """Match the distribution of spatial patterns over channels.

    Args:
        weight: factor of the sum over stages.
        supervised_weight: factor of the task's own loss.
    """

    zero_at_equality = True

    def __init__(self, *, weight: NonNegative = 50.0, supervised_weight: NonNegative = 1.0) -> None:
        super().__init__()
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
        """The supervised loss and the discrepancy, summed over stages."""
        discrepancies = [
            selectivity_discrepancy(ours, theirs)
            for ours, theirs in paired_stages(student, teachers["teacher"])
        ]
        return {
            "supervised": self.supervised_loss(student, batch),
            "selectivity": torch.stack(discrepancies).sum(),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "selectivity": self.weight}
