"""Classification: one label per sample."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from kdrun.inputs import call_network
from kdrun.losses.divergence import mean_over
from kdrun.outputs import Batch, ModelOutput
from kdrun.parameters import PositiveInt, ProperFraction
from kdrun.tasks.task import Task


class Classification(Task):
    """Top-1 (and top-5 from ten classes on) accuracy, cross-entropy and calibration.

    Args:
        num_classes: number of classes, from the data set.
        label_smoothing: mass of the target that is spread over all classes.
        calibration_bins: equal-width confidence bins of the expected calibration error.
    """

    name: ClassVar[str] = "classification"
    objective: ClassVar[str] = "accuracy"
    direction: ClassVar[Literal["max", "min"]] = "max"

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        label_smoothing: ProperFraction = 0.0,
        calibration_bins: PositiveInt = 15,
    ) -> None:
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.calibration_bins = calibration_bins

    def forward(self, network: nn.Module, batch: Batch) -> ModelOutput:
        """Logits ``(B, C)``; networks that return an object with ``logits`` are unpacked.

        Several inputs are passed by keyword.
        """
        output = call_network(network, batch.inputs)
        if isinstance(output, ModelOutput):
            return output
        return ModelOutput(output if isinstance(output, Tensor) else output.logits)

    def supervised_loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Cross-entropy in fp32, mean over the samples that count; targets are ids ``(B,)`` or soft
        ``(B, C)``."""
        logits = output.logits.float()
        if batch.mask is None:
            return functional.cross_entropy(
                logits, batch.target, label_smoothing=self.label_smoothing
            )
        # What does not count may have no class at all.
        target = torch.where(batch.mask, batch.target, 0)
        losses = functional.cross_entropy(
            logits, target, label_smoothing=self.label_smoothing, reduction="none"
        )
        return mean_over(losses, batch.mask)

    def metrics(self) -> MetricCollection:
        """``accuracy`` and ``accuracy_top5`` in percent, ``loss`` in nats, ``ece`` in percent."""
        metrics = {
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
            "loss": MeanMetric(),
            "ece": MulticlassCalibrationError(self.num_classes, n_bins=self.calibration_bins),
        }
        if self.num_classes >= 10:
            metrics["accuracy_top5"] = MulticlassAccuracy(
                self.num_classes, top_k=5, average="micro"
            )
        return MetricCollection(metrics, compute_groups=False)

    def update_metrics(self, metrics: MetricCollection, output: ModelOutput, batch: Batch) -> None:
        """Add the samples that count of one evaluated batch; targets are class ids ``(B,)``."""
        logits, target = output.logits.float(), batch.target
        if batch.mask is not None:
            logits, target = logits[batch.mask], target[batch.mask]
        losses = functional.cross_entropy(logits, target, reduction="none")
        metrics["loss"].update(losses)
        metrics["accuracy"].update(logits, target)
        metrics["ece"].update(torch.softmax(logits, dim=-1), target)
        if "accuracy_top5" in metrics:
            metrics["accuracy_top5"].update(logits, target)

    def compute(self, metrics: MetricCollection) -> dict[str, float]:
        """The values of the metrics, rates in percent."""
        values = {name: float(value) for name, value in metrics.compute().items()}
        return {name: v if name == "loss" else 100.0 * v for name, v in values.items()}

    def predictions(self, output: ModelOutput) -> dict[str, Tensor]:
        """The ``prediction``, a class id, and its probability as ``confidence``."""
        confidence, prediction = output.logits.float().softmax(-1).max(-1)
        return {"prediction": prediction, "confidence": confidence}

    def chance(self) -> tuple[float, float] | None:
        """Guessing: 100 / C percent, and half of that again as the margin."""
        return 100.0 / self.num_classes, 50.0 / self.num_classes
