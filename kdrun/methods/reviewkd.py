"""Distilling knowledge via knowledge review, ReviewKD (Chen, Liu, Zhao, Jia; CVPR 2021).

Deeper stages of the student review what shallower stages of the teacher know: from the pooled
vector downwards, each level is fused with what the level above has passed on, and predicts the
teacher's features of its own level (arXiv 2104.09044, equations 5-8):

    L = CE + min(epoch / warmup, 1) * weight * sum_levels HCL(fused_s, f_t)

with the epoch counted from 1. Levels are the stages and the pooled vector as a 1x1 map. Fusion
(ABF) weighs a level and the passed-on map by two attention maps; HCL compares at several
resolutions. The teacher's stages are tapped before their last ReLU, the student's after it, as on
CIFAR-100; the official ImageNet runs tap the student before it too. Stages are paired from the
deepest one. The fusion modules are trained with the student and do not ship with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun.layers.stages import require_maps, stage_features
from kdrun.losses.feature_maps import hierarchical_context_loss
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, PositiveInt

PREACTIVATION = ".preactivation"


class AttentionFusion(nn.Module):
    """Fuse one level of the student with what the level above passes on (ABF of the paper).

    Args:
        channels: of the student's level.
        channels_between: of the map that is passed on.
        channels_out: of the teacher's level.
        deepest: the first level to be reviewed, to which nothing is passed on.
    """

    def __init__(
        self, channels: int, channels_between: int, channels_out: int, *, deepest: bool
    ) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, channels_between, 1, bias=False), nn.BatchNorm2d(channels_between)
        )
        self.attention = (
            None if deepest else nn.Sequential(nn.Conv2d(2 * channels_between, 2, 1), nn.Sigmoid())
        )
        self.expand = nn.Sequential(
            nn.Conv2d(channels_between, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        nn.init.kaiming_uniform_(self.reduce[0].weight, a=1)
        nn.init.kaiming_uniform_(self.expand[0].weight, a=1)

    def forward(
        self, features: Tensor, passed_on: Tensor | None, size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher, and what is passed on to the next shallower level.

        Args:
            features: the student's level ``(B, C, H, W)``.
            passed_on: from the level above, ``(B, M, h, w)``; None at the deepest.
            size: spatial size of the teacher's level, which both results have.
        """
        fused = self.reduce(features)
        if self.attention is not None:
            passed_on = F.interpolate(passed_on, fused.shape[-2:], mode="nearest")
            own, other = self.attention(torch.cat([fused, passed_on], dim=1)).split(1, dim=1)
            fused = own * fused + other * passed_on
        if fused.shape[-2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.expand(fused), fused


class ReviewKD(Method):
    """Review shallower teacher features with deeper student features.

    Args:
        weight: factor of the sum over levels.
        warmup_epochs: epochs over which it rises linearly to full size.
        largest_width: upper bound of the channels that are passed on; fewer where the student's
            pooled vector is narrower.
        student_preactivation: tap the student's stages before their last ReLU.
        supervised_weight: factor of the task's own loss.
    """

    def __init__(
        self,
        *,
        weight: NonNegative = 1.0,
        warmup_epochs: PositiveInt = 20,
        largest_width: PositiveInt = 512,
        student_preactivation: bool = False,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.warmup_epochs = warmup_epochs
        self.largest_width = largest_width
        self.student_suffix = PREACTIVATION if student_preactivation else ""
        self.supervised_weight = supervised_weight

    def taps(self) -> Taps:
        """Stages and pooled vector of both."""
        return {
            "student": (f"stages{self.student_suffix}", "penultimate"),
            "teacher": (f"stages{PREACTIVATION}", "penultimate"),
        }

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build one fusion per level."""
        pairs = self._levels(student, teachers["teacher"])
        width = min(self.largest_width, pairs[0][0].shape[1])
        self.fusions = nn.ModuleList()
        for number, (ours, theirs) in enumerate(pairs):
            require_maps(ours, theirs)
            self.fusions.append(
                AttentionFusion(ours.shape[1], width, theirs.shape[1], deepest=number == 0)
            )

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the context loss, summed over levels."""
        passed_on, losses = None, []
        pairs = self._levels(student, teachers["teacher"])
        for fusion, (ours, theirs) in zip(self.fusions, pairs, strict=True):
            predicted, passed_on = fusion(ours, passed_on, theirs.shape[-2:])
            losses.append(hierarchical_context_loss(predicted, theirs))
        return {
            "supervised": self.supervised_loss(student, batch),
            "review": torch.stack(losses).sum(),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """A factor that rises over the warm-up."""
        warmup = min((progress.epoch + 1) / self.warmup_epochs, 1.0)
        return {"supervised": self.supervised_weight, "review": warmup * self.weight}

    def _levels(self, student: ModelOutput, teacher: ModelOutput) -> list[tuple[Tensor, Tensor]]:
        """Levels of student and teacher, the pooled vectors first and the shallowest last."""
        ours = [*stage_features(student, self.student_suffix), _as_map(student)]
        theirs = [*stage_features(teacher, PREACTIVATION), _as_map(teacher)]
        return list(zip(reversed(ours), reversed(theirs), strict=False))


def _as_map(output: ModelOutput) -> Tensor:
    return output.features["penultimate"][:, :, None, None]
