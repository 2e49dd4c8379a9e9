"""CAT-KD: class attention transfer based knowledge distillation (Guo et al.; CVPR 2023).

A class activation map shows where a network sees evidence for a class. Student and teacher are
rewritten so that these maps are computed on the way to the logits, and the student matches the
teacher's (Guo, Yan, Li, Lin; arXiv 2304.12777, equations 3-6):

    CAM = 1x1 convolution of f to C channels, without bias;   logits = spatial average of CAM
    L = CE + weight * mean((pool_r(CAM_s) - pool_r(CAM_t))^2)

with f ``(B, D, H, W)`` the map whose average the classifier reads. The convolution has the weights
of the linear classifier that it replaces, whose bias is dropped: in the student as its start, in
the teacher for good. pool_r averages over r x r cells; with ``normalize`` each pooled map is then
scaled to unit norm. The rewritten student is the one that is evaluated and ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun.layers.surgery import find_classifier, find_pooled_map, insert, replace_module
from kdrun.losses.feature_maps import average_pool
from kdrun.losses.precision import full_precision
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, PositiveInt


@full_precision
def class_attention_distance(
    student: Tensor, teacher: Tensor, *, resolution: int, normalize: bool
) -> Tensor:
    """Squared difference of pooled class activation maps, mean over every entry.

    Args:
        student: ``(B, C, H, W)``.
        teacher: ``(B, C, H', W')``.
        resolution: r, the maps are averaged over r x r cells.
        normalize: scale each pooled map to unit norm.
    """
    maps = [average_pool(cam, (resolution, resolution)) for cam in (student, teacher)]
    if normalize:
        maps = [F.normalize(cam.flatten(2), dim=2) for cam in maps]
    return F.mse_loss(*maps)


class CATKD(Method):
    """Match the class activation maps.

    Args:
        resolution: r, the maps are averaged over r x r cells.
        normalize: scale each pooled map to unit norm.
        weight: factor of the attention term.
        supervised_weight: factor of the task's own loss.
    """

    zero_at_equality = True

    def __init__(
        self,
        *,
        resolution: PositiveInt = 2,
        normalize: bool = False,
        weight: NonNegative = 15.0,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.normalize = normalize
        self.weight = weight
        self.supervised_weight = supervised_weight

    def wrap(self, student: nn.Module, teachers: Mapping[str, nn.Module], sample: Any) -> nn.Module:
        """Rewrite the student's head; keep the teacher's classifier as a convolution.

        Raises:
            ValueError: a classifier that does not read the spatial average of a map.
        """
        teacher = teachers["teacher"]
        self._teacher_map, _ = find_pooled_map(teacher, sample)
        weight = teacher.get_submodule(find_classifier(teacher, sample)).weight
        self.register_buffer("teacher_classifier", weight.detach().clone()[:, :, None, None])
        location, _ = find_pooled_map(student, sample)
        path = find_classifier(student, sample)
        weight = student.get_submodule(path).weight
        classifier = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
        with torch.no_grad():
            classifier.weight.copy_(weight[:, :, None, None])
        replace_module(student, path, nn.Identity())
        self._student_cam = insert(student, location, classifier)
        return student

    def taps(self) -> Taps:
        """The student's class activation maps, and the map that the teacher's classifier reads."""
        teacher_map = self._teacher_map
        if not teacher_map.startswith("input:"):
            teacher_map = f"module:{teacher_map}"
        return {"student": (f"module:{self._student_cam}",), "teacher": (teacher_map,)}

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the distance of the class activation maps."""
        (ours,) = student.features.values()
        (features,) = teachers["teacher"].features.values()
        theirs = F.conv2d(features, self.teacher_classifier)
        attention = class_attention_distance(
            ours, theirs, resolution=self.resolution, normalize=self.normalize
        )
        return {"supervised": self.supervised_loss(student, batch), "attention": attention}

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "attention": self.weight}
