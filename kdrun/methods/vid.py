"""Variational information distillation (Ahn, Hu, Damianou, Lawrence, Dai; CVPR 2019).

The student's features shall tell as much as possible about the teacher's. A lower bound of their
mutual information is the likelihood of the teacher's map under a Gaussian whose mean a regressor
predicts and whose variance is learnt for each channel (arXiv 1904.05835, equations 3-6):

    L = CE + weight * sum_stages mean( (mu(f_s) - f_t)^2 / (2 var) + log(var) / 2 )
    var = softplus(rho) + 1e-5, one per teacher channel

with the mean over everything of maps f ``(B, C, H, W)``. The regressor mu is three 1x1 convolutions
with ReLU between. The larger map of a pair is average-pooled; stages are paired from the deepest
one. rho is trained, as in the authors' code (in one popular benchmark it is not, by oversight).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun.layers.stages import paired_stages, require_maps
from kdrun.losses.feature_maps import gaussian_negative_log_likelihood, pool_to_smaller
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive

SMALLEST_VARIANCE = 1e-5


class ChannelGaussian(nn.Module):
    """A Gaussian over the teacher's map given the student's.

    Args:
        channels: of the student's map.
        channels_out: of the teacher's map.
        variance: of every channel at the start.
    """

    def __init__(self, channels: int, channels_out: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels, channels_out, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 1, bias=False),
        )
        # The inverse of softplus, in a form that no large variance overflows.
        softplus = variance - SMALLEST_VARIANCE
        rho = softplus + math.log(-math.expm1(-softplus))
        self.rho = nn.Parameter(torch.full((channels_out,), rho))

    def forward(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(B, C, H, W)`` and variance ``(C, 1, 1)`` of the teacher's map."""
        variance = F.softplus(self.rho) + SMALLEST_VARIANCE
        return self.mean(student), variance[:, None, None]


class VID(Method):
    """Maximise a bound on the mutual information with the teacher's maps.

    Args:
        initial_variance: variance of every channel at the start, above 1e-5.
        weight: factor of the sum over stages.
        supervised_weight: factor of the task's own loss.
    """

    def __init__(
        self,
        *,
        initial_variance: Positive = 5.0,
        weight: NonNegative = 1.0,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        if initial_variance <= SMALLEST_VARIANCE:
            raise ValueError(f"initial_variance={initial_variance:g} must exceed 1e-5")
        self.initial_variance = initial_variance
        self.weight = weight
        self.supervised_weight = supervised_weight

    def taps(self) -> Taps:
        """Maps of all stages."""
        return {"student": ("stages",), "teacher": ("stages",)}

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build one Gaussian per pair of stages."""
        self.gaussians = nn.ModuleList()
        for ours, theirs in paired_stages(student, teachers["teacher"]):
            require_maps(ours, theirs)
            gaussian = ChannelGaussian(ours.shape[1], theirs.shape[1], self.initial_variance)
            self.gaussians.append(gaussian)

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the negative log-likelihood, summed over stages."""
        likelihoods = []
        pairs = paired_stages(student, teachers["teacher"])
        for gaussian, pair in zip(self.gaussians, pairs, strict=True):
            ours, theirs = pool_to_smaller(*pair)
            mean, variance = gaussian(ours)
            likelihoods.append(gaussian_negative_log_likelihood(mean, theirs, variance))
        return {
            "supervised": self.supervised_loss(student, batch),
            "likelihood": torch.stack(likelihoods).sum(),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "likelihood": self.weight}
