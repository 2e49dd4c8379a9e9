"""OFD: a comprehensive overhaul of feature distillation (Heo et al.; ICCV 2019).

Features are compared just before the ReLU that ends a stage, where negative values still say how
far a neuron is from firing, but only as far as that matters (Heo, Kim, Yun, Park, Kwak, Choi;
arXiv 1904.01866):

    L = CE + weight * sum_i 2^-(n-1-i) d(r_i(f_s,i), f_t,i),   i = 0 .. n-1 from shallow to deep

d is a squared error, summed over a map and averaged over samples, that leaves out what the ReLU
hides: teacher values below a negative margin are raised to it, and a student below a target that is
not positive is left alone. The margin is the mean of a channel's negative values, computed from the
batch norm before the ReLU, so the teacher must end its stages in batch norm and ReLU. r is a 1x1
convolution with batch norm, trained with the student. The teacher's map is average-pooled to the
student's size; stages are paired from the deepest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.layers.stages import paired_stages, require_maps
from kdrun.layers.taps import tap_points
from kdrun.losses.feature_maps import average_pool, negative_margin, partial_squared_error
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative

PREACTIVATION = ".preactivation"


class OFD(Method):
    """Match pre-activations up to what the ReLU hides.

    Args:
        weight: factor of the sum over stages.
        supervised_weight: factor of the task's own loss.
    """

    def __init__(self, *, weight: NonNegative = 1e-3, supervised_weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.supervised_weight = supervised_weight

    def taps(self) -> Taps:
        """Stages of both, before their last ReLU."""
        stages = (f"stages{PREACTIVATION}",)
        return {"student": stages, "teacher": stages}

    def wrap(self, student: nn.Module, teachers: Mapping[str, nn.Module], sample: Any) -> nn.Module:
        """Compute the margins from the teacher's batch norms, shallow to deep.

        Raises:
            ValueError: a stage of the teacher does not end in batch norm and ReLU.
        """
        teacher = teachers["teacher"]
        points = tap_points(teacher, sample)
        stages = [name for name in points if name.removeprefix("stage").isdigit()]
        margins = []
        for stage in sorted(stages, key=lambda name: int(name.removeprefix("stage"))):
            norm = points.get(f"{stage}.norm")
            module = None if norm is None else teacher.get_submodule(norm)
            if not isinstance(module, nn.BatchNorm2d) or not module.affine:
                raise ValueError(
                    f"the margin needs a batch norm before the last ReLU of every stage; {stage} "
                    f"of the teacher ({type(teacher).__name__}) has none"
                )
            with torch.no_grad():
                margins.append(negative_margin(module.weight.double(), module.bias.double()))
        self._margins = [margin.float() for margin in margins]
        return student

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build one connector per pair of stages."""
        pairs = paired_stages(student, teachers["teacher"], PREACTIVATION)
        self.connectors = nn.ModuleList()
        for number, (ours, theirs) in enumerate(pairs):
            require_maps(ours, theirs)
            self.connectors.append(connector(ours.shape[1], theirs.shape[1]))
            margin = self._margins[number - len(pairs)]
            self.register_buffer(f"margin{number}", margin)

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the partial squared error, weighted over stages."""
        pairs = paired_stages(student, teachers["teacher"], PREACTIVATION)
        errors = []
        for number, (connect, (ours, theirs)) in enumerate(
            zip(self.connectors, pairs, strict=True)
        ):
            theirs = average_pool(theirs, ours.shape[-2:])
            margin = self.get_buffer(f"margin{number}")
            error = partial_squared_error(connect(ours), theirs, margin)
            errors.append(error / 2 ** (len(pairs) - 1 - number))
        return {
            "supervised": self.supervised_loss(student, batch),
            "overhaul": torch.stack(errors).sum(),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "overhaul": self.weight}


def connector(channels: int, channels_out: int) -> nn.Sequential:
    """A 1x1 convolution without bias and a batch norm, from student to teacher channels."""
    convolution = nn.Conv2d(channels, channels_out, 1, bias=False)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / channels_out))
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))
