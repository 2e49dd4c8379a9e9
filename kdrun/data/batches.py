"""From stored samples to batches: the random plan of an epoch, augmentation, normalisation."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdrun.data.augment import Augmentation, Draws, Mix
from kdrun.data.loader import AUGMENTATION, MIXING, LoaderOptions
from kdrun.data.normalise import Normalisation
from kdrun.data.seeding import stream
from kdrun.outputs import Batch

INPUTS = "inputs"
"""The name of ``Batch.inputs`` among the views."""

Shape = tuple[int, ...] | dict[str, tuple[int, ...]]
"""Of one input; by name where a sample has several."""


def described(shape: Shape) -> str:
    """The shape in words: ``3x32x32``, or ``image 1x8x8, audio 40x32``."""
    if isinstance(shape, dict):
        return ", ".join(f"{name} {described(one)}" for name, one in shape.items())
    return "x".join(map(str, shape)) or "one number"


_FORMAT = {True: torch.channels_last, False: torch.preserve_format}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What a data set does to stored samples.

    Attributes:
        normalisation: applied last; None leaves the values as stored.
        augmentation: of the inputs for training; None for none.
        views: name to augmentation of further views, drawn independently.
        mix: mixes the samples of training batches; None for none.
        num_classes: width of the soft targets of mixed samples.
    """

    normalisation: Normalisation | None = None
    augmentation: Augmentation | None = None
    views: Mapping[str, Augmentation] = field(default_factory=dict)
    mix: Mix | None = None
    num_classes: int = 0


@dataclass(slots=True)
class Plan:
    """All random choices of one epoch, on the device, in the order of the epoch."""

    epoch: int
    order: Tensor
    draws: dict[str, Draws]


@dataclass(frozen=True, slots=True)
class Span:
    """Places ``first`` to ``last`` of an epoch's order, after ``lead`` where it is not None."""

    first: int
    last: int
    lead: int | None = None

    def cut(self, rows: Tensor) -> Tensor:
        """The rows at these places."""
        if self.lead is None:
            return rows[self.first : self.last]
        return torch.cat([rows[self.lead : self.lead + 1], rows[self.first : self.last]])


class BatchMaker:
    """Makes the batches of one split, wherever its samples come from.

    The random parameters of an epoch are drawn for every sample when the epoch begins, in the order
    in which samples are stored: a batch then costs a few tensor operations, nothing is sent to the
    device, and how a sample is augmented in an epoch depends neither on the batch size nor on the
    number of ranks.

    Args:
        size: samples in the split.
        shape: of one stored sample.
        options: batch size, seed, rank, type and so on.
        preprocessing: what the data set does.
    """

    def __init__(
        self,
        size: int,
        shape: Shape,
        options: LoaderOptions,
        preprocessing: Preprocessing,
    ) -> None:
        self.size, self.shape, self.options = size, shape, options
        self.normalisation = preprocessing.normalisation
        self.num_classes = preprocessing.num_classes
        mix = preprocessing.mix
        self.mix = mix if options.augment and mix and mix.mixes else None
        wanted = {INPUTS: preprocessing.augmentation}
        wanted |= {name: preprocessing.views[name] for name in options.views}
        self.changes: dict[str, Augmentation | None] = {
            name: change if options.augment and change and change.changes_images else None
            for name, change in wanted.items()
        }
        self._plans: dict[int, Plan] = {}
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

        if isinstance(shape, dict) and not (self.changes_nothing and self.normalisation is None):
            raise ValueError("several inputs are neither normalised nor augmented")

    @property
    def changes_nothing(self) -> bool:
        """Whether batches hold the stored samples, normalised and no more."""
        return self.mix is None and all(change is None for change in self.changes.values())

    def plan(self, epoch: int) -> Plan:
        """The random choices of an epoch; those of the last two epochs asked for are kept."""
        if epoch not in self._plans:
            if len(self._plans) == 2:  # the epoch under way and one being replayed
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = self._draw(epoch)
        return self._plans[epoch]

    def order(self, epoch: int) -> Tensor:
        """The order of the samples in an epoch, ``(N,)`` int64 on the CPU; the last is kept."""
        if self._order[0] != epoch:
            self._order = (epoch, self.options.order(self.size, epoch))
        return self._order[1]

    def augmentation(self, epoch: int) -> int:
        """The number that batches of an epoch carry as ``Batch.augmentation``."""
        return self.options.augmentation(epoch)[1]

    def span(self, position: int) -> Span:
        """Which places of the epoch's order this rank needs for batch ``position``.

        A sample is mixed with the one before it in the global batch, so mixing needs one more.
        """
        first, last = self.options.bounds(self.size, position)
        if self.mix is None:
            return Span(first, last)
        start, stop = replace(self.options, rank=0, world_size=1).bounds(self.size, position)
        return Span(first, last, lead=(stop if first == start else first) - 1)

    def make(
        self,
        stored: Mapping[str, Tensor],
        target: Tensor,
        index: Tensor,
        plan: Plan,
        position: int,
    ) -> Batch:
        """One batch.

        Args:
            stored: by view, the stored samples at the places of ``span(position)``.
            target: ``(B,)`` of the same samples.
            index: ``(B,)`` of the same samples.
            plan: of the epoch.
            position: number of the batch in the epoch.
        """
        span = self.span(position)
        views = {}
        for name, augmentation in self.changes.items():
            images = stored[name]
            if augmentation is not None:
                draws = {key: span.cut(value) for key, value in plan.draws[name].items()}
                images = augmentation.apply(images, draws)
            views[name] = self.finish(images)
        number = self.augmentation(plan.epoch)
        batch = Batch(views.pop(INPUTS), target, index, views=views, augmentation=number)
        if self.mix is None:
            return batch
        words = (self.options.seed, plan.epoch, MIXING, position)
        return self.mix(batch, self.num_classes, *words)

    def finish(self, x: Tensor) -> Tensor:
        """The last step: normalisation, type and memory format."""
        return self.arrange(x if self.normalisation is None else self.normalisation(x))

    def arrange(self, x: Tensor) -> Tensor:
        """The type and memory format that the networks asked for; no copy where it is so."""
        channels_last = self.options.channels_last and x.ndim == 4
        return x.to(self.options.dtype, memory_format=_FORMAT[channels_last])

    def _draw(self, epoch: int) -> Plan:
        device, order = self.options.device, self.order(epoch)
        draws = {}
        for name, augmentation in self.changes.items():
            if augmentation is not None:
                # Named by content, so that a view's draws do not depend on which others are asked.
                named = self.options.augmentation(epoch)
                words = (*named, AUGMENTATION, zlib.crc32(name.encode()))
                # A sample that is drawn twice is augmented in two ways, unless its number and that
                # of the augmentation are to name what is shown.
                once = self.options.draws is None or self.options.cycle is not None
                count = self.size if once else len(order)
                drawn = augmentation.draw(count, self.shape, stream(*words))
                draws[name] = {
                    key: (value[order] if once else value).to(device)
                    for key, value in drawn.items()
                }
        return Plan(epoch, order.to(device), draws)
