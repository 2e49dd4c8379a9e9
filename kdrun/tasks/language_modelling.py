"""Language modelling: the next token at every position of a sequence."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, MetricCollection

from kdrun.inputs import call_network
from kdrun.outputs import Batch, ModelOutput
from kdrun.parameters import Positive, PositiveInt, ProperFraction
from kdrun.tasks.task import Task


class LanguageModelling(Task):
    """Nats per token, perplexity, top-1 accuracy and, with text, bits per byte.

    Batches come with targets and mask aligned to the inputs
    (``kdrun.outputs.next_token_batch``), so nothing is shifted here.

    Args:
        num_classes: size of the vocabulary, from the data set.
        label_smoothing: mass of the target that is spread over the vocabulary.
        bytes_per_token: of the text, from the data set; null: no bits per byte.
    """

    name: ClassVar[str] = "language_modelling"
    objective: ClassVar[str] = "loss"
    direction: ClassVar[Literal["max", "min"]] = "min"

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        label_smoothing: ProperFraction = 0.0,
        bytes_per_token: Positive | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.bytes_per_token = bytes_per_token

    def forward(self, network: nn.Module, batch: Batch) -> ModelOutput:
        """Logits ``(B, L, C)`` over the data set's vocabulary.

        Networks often have a few more rows than the tokenizer has tokens, for speed; their logits
        are cut, since no text can ask for them.
        """
        output = call_network(network, batch.inputs)
        if isinstance(output, ModelOutput):
            return output
        logits = output if isinstance(output, Tensor) else output.logits
        return ModelOutput(logits[..., : self.num_classes])

    def supervised_loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Cross-entropy in fp32, mean over the tokens that count; zero where none does."""
        losses = self._losses(output, batch, self.label_smoothing)
        if batch.mask is None:
            return losses.mean()
        return (losses * batch.mask).sum() / batch.mask.sum().clamp(min=1)

    def metrics(self) -> MetricCollection:
        """``loss`` in nats per token and ``accuracy`` in percent; the others follow from them."""
        metrics = {"loss": MeanMetric(), "accuracy": MeanMetric()}
        return MetricCollection(metrics, compute_groups=False)

    def update_metrics(self, metrics: MetricCollection, output: ModelOutput, batch: Batch) -> None:
        """Add one evaluated batch; every token that counts weighs the same."""
        losses = self._losses(output, batch, smoothing=0.0)
        hits = (output.logits.argmax(-1) == batch.target).to(losses.dtype)
        weight = losses.new_ones(losses.shape) if batch.mask is None else batch.mask.to(losses)
        metrics["loss"].update(losses, weight)
        metrics["accuracy"].update(hits, weight)

    def compute(self, metrics: MetricCollection) -> dict[str, float]:
        """``loss``, ``perplexity``, ``accuracy`` in percent, and ``bits_per_byte``."""
        values = {name: float(value) for name, value in metrics.compute().items()}
        loss = values["loss"]
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        found["accuracy"] = 100.0 * values["accuracy"]
        if self.bytes_per_token is not None:
            found["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return found

    def chance(self) -> tuple[float, float] | None:
        """Every token equally likely: ln C nats; one that has learned anything is well below."""
        return math.log(self.num_classes), 0.1 * math.log(self.num_classes)

    def _losses(self, output: ModelOutput, batch: Batch, smoothing: float) -> Tensor:
        """Cross-entropy of each position, ``(B, L)``."""
        return functional.cross_entropy(
            output.logits.float().transpose(1, 2),
            batch.target,
            reduction="none",
            label_smoothing=smoothing,
        )
