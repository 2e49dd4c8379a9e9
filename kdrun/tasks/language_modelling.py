"""Language modelling: the next token at every position of a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, MetricCollection

from kdrun.inputs import call_network
from kdrun.outputs import Batch, HeadLogits, ModelOutput
from kdrun.parameters import Positive, PositiveInt, ProperFraction
from kdrun.tasks.task import Task


@runtime_checkable
class HasLastLayer(Protocol):
    """A network that tells its last layer, as transformers' do, and what is below it.

    The network below is its ``base_model``. That is not asked for here: from Python 3.12 on,
    ``isinstance`` looks past what a module keeps as a child.
    """

    def get_output_embeddings(self) -> nn.Module:
        """The layer that gives the logits."""


class LanguageModelling(Task):
    """Nats per token, perplexity, top-1 accuracy and, with text, bits per byte.

    Batches come with targets and mask aligned to the inputs
    (``kdrun.outputs.next_token_batch``), so nothing is shifted here.

    Args:
        num_classes: size of the vocabulary, from the data set.
        label_smoothing: mass of the target that is spread over the vocabulary.
        bytes_per_token: of the text, from the data set; null: no bits per byte.
        chunk: positions whose logits exist at once, for large vocabularies: networks (of
            transformers) then hand over the input of their last layer. Null: all of them.
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
        chunk: PositiveInt | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.bytes_per_token = bytes_per_token
        self.chunk = chunk
        self._compared: WeakSet[nn.Module] = WeakSet()

    def forward(self, network: nn.Module, batch: Batch) -> ModelOutput:
        """Logits ``(B, L, C)`` over the data set's vocabulary.

        Networks often have a few more rows than the tokenizer has tokens, for speed; their logits
        are cut, since no text can ask for them.
        """
        if self.chunk is not None:
            return ModelOutput(self._head_logits(network, batch, self.chunk))
        output = call_network(network, batch.inputs)
        if isinstance(output, ModelOutput):
            return output
        logits = output if isinstance(output, Tensor) else output.logits
        return ModelOutput(logits[..., : self.num_classes])

    def _head_logits(self, network: nn.Module, batch: Batch, chunk: int) -> HeadLogits:
        """The input of the last layer, and that layer.

        Raises:
            ValueError: the network does not tell them, or does more to its logits than that layer
                (caps or scales them).
        """
        if not isinstance(network, HasLastLayer) or not isinstance(
            below := getattr(network, "base_model", None), nn.Module
        ):
            raise ValueError("it does not tell its last layer; set task.chunk=null")
        head = network.get_output_embeddings()
        bias = None if head.bias is None else head.bias[: self.num_classes]
        hidden = below(batch.inputs).last_hidden_state
        if network not in self._compared:
            if not _is_all(head, network, batch.inputs[:1, :2]):
                raise ValueError("its logits are not its last layer's alone; set task.chunk=null")
            self._compared.add(network)
        return HeadLogits(hidden, head.weight[: self.num_classes], bias, chunk)

    def supervised_loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Cross-entropy in fp32, mean over the tokens that count; zero where none does."""
        parts = self._parts(output, batch)
        losses = torch.cat([self._cross_entropy(*part, self.label_smoothing) for part in parts])
        if batch.mask is None:
            return losses.mean()
        counted = batch.mask.flatten()
        return (losses * counted).sum() / counted.sum().clamp(min=1)

    def metrics(self) -> MetricCollection:
        """``loss`` in nats per token and ``accuracy`` in percent; the others follow from them."""
        metrics = {"loss": MeanMetric(), "accuracy": MeanMetric()}
        return MetricCollection(metrics, compute_groups=False)

    def update_metrics(self, metrics: MetricCollection, output: ModelOutput, batch: Batch) -> None:
        """Add one evaluated batch; every token that counts weighs the same."""
        losses, hits = [], []
        for logits, target in self._parts(output, batch):
            dense = logits.dense() if isinstance(logits, HeadLogits) else logits
            losses.append(self._cross_entropy(dense, target, smoothing=0.0))
            hits.append((dense.argmax(-1) == target).to(losses[-1].dtype))
        loss, hit = torch.cat(losses), torch.cat(hits)
        weight = torch.ones_like(loss) if batch.mask is None else batch.mask.flatten().to(loss)
        metrics["loss"].update(loss, weight)
        metrics["accuracy"].update(hit, weight)

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

    def _parts(self, output: ModelOutput, batch: Batch) -> Iterator[tuple[Logits, Tensor]]:
        """Logits ``(N, C)`` and targets ``(N,)`` of as many positions as may exist at once."""
        logits, target = output.logits, batch.target.flatten()
        if isinstance(logits, Tensor):
            yield logits.flatten(0, 1), target
            return
        hidden = logits.hidden.flatten(0, 1)
        for first in range(0, len(target), logits.chunk):
            rows = slice(first, first + logits.chunk)
            yield replace(logits, hidden=hidden[rows]), target[rows]

    def _cross_entropy(self, logits: Logits, target: Tensor, smoothing: float) -> Tensor:
        """Of each position, ``(N,)``; logits that do not exist yet are made again for backward."""
        if isinstance(logits, HeadLogits):
            return checkpoint(_of_head, logits, target, smoothing, use_reentrant=False)
        return _cross_entropy(logits, target, smoothing)


Logits = Tensor | HeadLogits


@torch.no_grad()
def _is_all(head: nn.Module, network: nn.Module, few: Tensor) -> bool:
    """Whether logits are what the last layer gives.

    A cap leaves the small logits of a new network as they are, so they are enlarged for this.
    """

    def enlarged(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * (1000 / output.abs().max().clamp(min=1e-6))

    handle = head.register_forward_hook(enlarged)
    try:
        mine = head(network.base_model(few).last_hidden_state)
        return torch.allclose(mine, network(few).logits, rtol=1e-3, atol=1e-4)
    finally:
        handle.remove()


def _of_head(logits: HeadLogits, target: Tensor, smoothing: float) -> Tensor:
    return _cross_entropy(logits.dense(), target, smoothing)


def _cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """In fp32 or wider, whatever precision the network runs in."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
