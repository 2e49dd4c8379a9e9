"""SimKD: knowledge distillation with the reused teacher classifier (Chen et al.; CVPR 2022).

The student learns nothing but the features that the teacher's classifier reads, and predicts with
that very classifier (Chen, Mei, Zhang, Wang, Feng, Chen; arXiv 2203.14001, equation 3):

    L = weight * mean((r(f_s) - f_t)^2),    logits = teacher's classifier(average of r(f_s))

with f ``(B, C, H, W)`` the map whose spatial average the classifier reads. The projector r reduces
the teacher's channels by ``reduction``: convolutions 1x1, 3x3 and 1x1, each with batch norm and
ReLU. The larger map is average-pooled to the smaller. There is neither a supervised term nor one on
logits.

The student is rebuilt for it: projector and a frozen copy of the teacher's classifier take the
place of the student's own classifier, in training as at test, and ship with it. In networks that
put one more convolution between the last stage and the pooling (MobileNetV2, ShuffleNetV2) the
paper's code projects the map before that convolution and leaves it untrained; here the map after it
is projected.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdrun.layers.surgery import find_classifier, find_pooled_map, insert, replace_module
from kdrun.losses.feature_maps import average_pool, mean_squared_error, pool_to_smaller
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, PositiveInt


class SimKD(Method):
    """Give the student the teacher's classifier and the features that it reads.

    Args:
        reduction: r, the teacher's channels over those inside the projector.
        weight: factor of the feature term.
    """

    def __init__(self, *, reduction: PositiveInt = 2, weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.reduction = reduction
        self.weight = weight

    def wrap(self, student: nn.Module, teachers: Mapping[str, nn.Module], sample: Any) -> nn.Module:
        """Rebuild the student's head.

        Raises:
            ValueError: a classifier that does not read the spatial average of a map.
        """
        teacher = teachers["teacher"]
        self._teacher_map, target = find_pooled_map(teacher, sample)
        location, source = find_pooled_map(student, sample)
        classifier = copy.deepcopy(teacher.get_submodule(find_classifier(teacher, sample)))
        replace_module(student, find_classifier(student, sample), classifier.requires_grad_(False))
        projector = make_projector(source[1], target[1], target[1] // self.reduction)
        if source[2] > target[2]:
            projector.insert(0, AveragePool(tuple(target[2:])))
        self._projected = insert(student, location, projector)
        return student

    def taps(self) -> Taps:
        """The projected map of the student, and the map that the teacher's classifier reads."""
        teacher_map = self._teacher_map
        if not teacher_map.startswith("input:"):
            teacher_map = f"module:{teacher_map}"
        return {"student": (f"module:{self._projected}",), "teacher": (teacher_map,)}

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The squared error of the projected features."""
        (ours,) = student.features.values()
        (theirs,) = teachers["teacher"].features.values()
        return {"feature": mean_squared_error(*pool_to_smaller(ours, theirs))}

    def weights(self, progress: Progress) -> dict[str, float]:
        """A constant factor."""
        return {"feature": self.weight}


class AveragePool(nn.Module):
    """Average a map over a grid of cells.

    Args:
        size: cells along height and width.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, features: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, *size)``."""
        return average_pool(features, self.size)


def make_projector(channels: int, channels_out: int, width: int) -> nn.Sequential:
    """Convolutions 1x1, 3x3 and 1x1, each followed by batch norm and ReLU.

    Args:
        channels: of the student's map.
        channels_out: of the teacher's map.
        width: channels between.
    """
    projector = nn.Sequential()
    shapes = [(channels, width, 1), (width, width, 3), (width, channels_out, 1)]
    for inputs, outputs, kernel in shapes:
        projector.append(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False))
        projector.append(nn.BatchNorm2d(outputs))
        projector.append(nn.ReLU())
    return projector
