"""What flows between networks, tasks and methods: batches, outputs and where training stands.

Shape letters used throughout: ``B`` samples, ``C`` classes, ``D`` feature width, ``H, W`` spatial
size, ``L`` sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional


@dataclass(slots=True)
class Batch:
    """One mini-batch on the device of the networks.

    Attributes:
        inputs: what the networks read, a tensor ``(B, ...)`` or a dict of tensors.
        target: what the supervised loss reads; ``(B,)`` class ids in classification.
        index: ``(B,)`` the stable number of each sample in its data set.
        mask: positions that count, the shape of the logits without the class axis; None: all do.
        views: further views of the same samples by name, for methods that declare them.
        augmentation: number of the random augmentation that the inputs show; with ``index`` it
            names them.
        unlabelled: samples without labels that come with this batch, for methods that learn from
            them too; their ``target`` is -1 throughout. None: none.
    """

    inputs: Any
    target: Tensor
    index: Tensor
    mask: Tensor | None = None
    views: dict[str, Any] = field(default_factory=dict)
    augmentation: int = 0
    unlabelled: Batch | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    def rows(self, rows: slice) -> Batch:
        """The samples in ``rows`` as a batch of their own (views of the same memory).

        Every part keeps all unlabelled samples, so that a mean over them stays what it was.
        """
        mask = None if self.mask is None else self.mask[rows]
        return Batch(
            _cut(self.inputs, rows),
            self.target[rows],
            self.index[rows],
            mask,
            _cut(self.views, rows),
            self.augmentation,
            self.unlabelled,
        )


def next_token_batch(tokens: Tensor, counted: Tensor | None, index: Tensor) -> Batch:
    """Sequences as a batch in which every position is asked for the token that follows it.

    The causal shift is made here and nowhere else: inputs are all tokens but the last, targets all
    but the first, so logits, targets and mask are of one length and need no further alignment.

    Args:
        tokens: ids ``(B, L + 1)``.
        counted: ``(B, L + 1)``, true at tokens whose prediction counts; None: all of them.
        index: ``(B,)`` the stable number of each sequence.
    """
    mask = None if counted is None else counted[:, 1:]
    return Batch(tokens[:, :-1], tokens[:, 1:], index, mask)


@dataclass(frozen=True, slots=True)
class HeadLogits:
    """Logits that have not been computed: the input of a network's last layer, and that layer.

    A task may hand these over where classes are so many that the logits would not fit; methods that
    declare ``lazy_logits`` then compute them a few positions at a time.

    Attributes:
        hidden: ``(..., D)``.
        weight: ``(C, D)``.
        bias: ``(C,)``, or None.
        chunk: positions whose logits may exist at once.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    chunk: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits."""
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    def dense(self) -> Tensor:
        """All logits ``(..., C)``."""
        return functional.linear(self.hidden, self.weight, self.bias)


@dataclass(slots=True)
class ModelOutput:
    """What one network says of one batch.

    Attributes:
        logits: ``(B, C)``, or ``(B, ..., C)`` for dense tasks and sequences: classes come last.
            ``HeadLogits`` only where the method says that it can.
        features: tapped activations by tap name (``stage1``, ``penultimate``, ...).
        extra: anything else the network returns, by name.
        views: the network's output on each further view of the batch, by the view's name.
        unlabelled: the network's output on the unlabelled samples that came with the batch.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    views: dict[str, ModelOutput] = field(default_factory=dict)
    unlabelled: ModelOutput | None = None

    def rows(self, rows: slice) -> ModelOutput:
        """What the network says of the samples in ``rows``; extra tensors are cut as well."""
        return ModelOutput(self.logits[rows], _cut(self.features, rows), _cut(self.extra, rows))

    @property
    def dense_logits(self) -> Tensor:
        """The logits, computed if they have not been yet."""
        return self.logits.dense() if isinstance(self.logits, HeadLogits) else self.logits


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands when a step begins. Steps count optimiser steps."""

    epoch: int
    epochs: int
    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """Share of training that is done, in [0, 1)."""
        return self.step / max(self.steps, 1)


def _cut(value: Any, rows: slice) -> Any:
    if isinstance(value, dict):
        return {name: _cut(item, rows) for name, item in value.items()}
    return value[rows] if isinstance(value, Tensor) else value
