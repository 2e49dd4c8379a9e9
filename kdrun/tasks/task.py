"""What a student must do: the part of an experiment that knows the modality."""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

from torch import Tensor, nn
from torchmetrics import MetricCollection

from kdrun.outputs import Batch, ModelOutput


class Task:
    """How a network reads a batch, what it is trained for without a teacher, and how it is judged.

    Methods see what ``forward`` returns: logits with the classes last, and ``batch.mask`` (or None)
    of the shape of the logits without that axis. So one KL serves images, tokens and graph nodes.

    Class attributes:
        name: as in the config group.
        objective: the validation metric by which the best epoch is chosen.
        direction: whether a larger or a smaller objective is better.
    """

    name: ClassVar[str]
    objective: str
    direction: Literal["max", "min"]

    def judged_by(self, metric: str, direction: Literal["max", "min"]) -> Task:
        """This task with another metric for its objective."""
        task = copy.copy(self)
        task.objective, task.direction = metric, direction
        return task

    def forward(self, network: nn.Module, batch: Batch) -> ModelOutput:
        """Run a network on a batch."""
        raise NotImplementedError

    def supervised_loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The scalar loss against the ground truth, mean over samples."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """Fresh metrics; ``update_metrics`` feeds them."""
        raise NotImplementedError

    def update_metrics(self, metrics: MetricCollection, output: ModelOutput, batch: Batch) -> None:
        """Add one evaluated batch to the metrics."""
        raise NotImplementedError

    def compute(self, metrics: MetricCollection) -> dict[str, float]:
        """The values of the metrics by name, in the units that are reported."""
        raise NotImplementedError

    def predictions(self, output: ModelOutput) -> dict[str, Tensor] | None:
        """What a network says of each sample, ``(B,)`` values by name, kept for reports; None where
        a sample has more than one prediction."""
        return None

    def chance(self) -> tuple[float, float] | None:
        """Value of the objective for a network that knows nothing, and the margin above it that one
        should exceed; None where chance has no meaning. Used to refuse a useless teacher."""
        return None
