"""Data sets that fit: one tensor on the device of the networks, batches made there by indexing."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrun.data.augment import Augmentation, Draws, Mix
from kdrun.data.loader import AUGMENTATION, MIXING, LoaderOptions
from kdrun.data.normalise import Normalisation
from kdrun.data.seeding import stream
from kdrun.outputs import Batch

# Sets below this size are normalised once instead of batch by batch.
NORMALISE_ONCE_BYTES = 64 << 20
INPUTS = "inputs"
_FORMAT = {True: torch.channels_last, False: torch.preserve_format}


@dataclass(slots=True)
class Samples:
    """The samples of one part of a data set.

    Attributes:
        inputs: ``(N, ...)`` as stored, e.g. uint8 images ``(N, C, H, W)``.
        target: ``(N,)`` int64.
        index: ``(N,)`` int64, the stable number of each sample in the original set.
    """

    inputs: Tensor
    target: Tensor
    index: Tensor

    def __len__(self) -> int:
        return self.target.shape[0]

    def take(self, rows: Tensor) -> Samples:
        """The given rows as a part of their own; without a copy if they are all rows in order."""
        if rows.shape[0] == len(self) and torch.equal(rows, torch.arange(len(self))):
            return self
        return Samples(
            *(part.index_select(0, rows) for part in (self.inputs, self.target, self.index))
        )

    def to(self, device: torch.device | str) -> Samples:
        """The same samples on ``device``."""
        return Samples(self.inputs.to(device), self.target.to(device), self.index.to(device))


@dataclass(slots=True)
class _Plan:
    """All random choices of one epoch, on the device, in the order of the epoch."""

    order: Tensor
    draws: dict[str, Draws]


class ResidentLoader:
    """Batches of samples that live on the device; see ``kdrun.data.loader.Loader``.

    The random parameters of an epoch are drawn for every sample when the epoch begins, in the order
    in which samples are stored: a batch then costs a few tensor operations, nothing is sent to the
    device, and how a sample is augmented in an epoch depends neither on the batch size nor on the
    number of ranks.

    Args:
        samples: on the device.
        options: batch size, seed, rank, type and so on.
        normalisation: applied last; None leaves the values as stored.
        augmentation: of ``Batch.inputs``; None for none.
        views: name to augmentation of each further view, drawn independently.
        mix: mixes the samples of a global batch; every rank then makes the whole of it.
        num_classes: width of soft targets where samples are mixed.
    """

    def __init__(
        self,
        samples: Samples,
        options: LoaderOptions,
        *,
        normalisation: Normalisation | None = None,
        augmentation: Augmentation | None = None,
        views: Mapping[str, Augmentation] | None = None,
        mix: Mix | None = None,
        num_classes: int = 0,
    ) -> None:
        self.samples, self.options = samples, options
        self._normalisation = normalisation
        self._mix, self._num_classes = mix, num_classes
        # What makes each tensor of a batch from the stored samples; INPUTS is Batch.inputs.
        self._changes = {} if augmentation is None else {INPUTS: augmentation}
        self._changes |= views or {}
        if not self._changes and samples.inputs.numel() * 4 <= NORMALISE_ONCE_BYTES:
            self.samples = Samples(self._finish(samples.inputs), samples.target, samples.index)
            self._normalisation = None
        self._epoch, self._start = 0, 0
        self._plans: dict[int, _Plan] = {}

    def __len__(self) -> int:
        return self.options.batches(len(self.samples))

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and how many of its first batches to leave out."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        plan = self._plan(epoch)
        for position in range(self._start, len(self)):
            yield self._batch(plan, epoch, position)

    def replay(self, epoch: int, position: int) -> Batch:
        """One batch of any epoch again, bit for bit."""
        return self._batch(self._plan(epoch), epoch, position)

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            if len(self._plans) == 2:  # the epoch under way and one being replayed
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> _Plan:
        size, shape = len(self.samples), tuple(self.samples.inputs.shape[1:])
        device = self.samples.inputs.device
        order = self.options.order(size, epoch)
        draws = {}
        for name, augmentation in self._changes.items():
            # Named by content, so that one view's draws do not depend on which others are asked.
            words = (self.options.seed, epoch, AUGMENTATION, zlib.crc32(name.encode()))
            drawn = augmentation.draw(size, shape, stream(*words))
            draws[name] = {key: value[order].to(device) for key, value in drawn.items()}
        return _Plan(order.to(device), draws)

    def _batch(self, plan: _Plan, epoch: int, position: int) -> Batch:
        size, mine = len(self.samples), self.options.bounds(len(self.samples), position)
        if self._mix is None:
            return self._cut(plan, *mine)
        first, last = replace(self.options, rank=0, world_size=1).bounds(size, position)
        words = (self.options.seed, epoch, MIXING, position)
        mixed = self._mix(self._cut(plan, first, last), self._num_classes, *words)
        return mixed.rows(slice(mine[0] - first, mine[1] - first))

    def _cut(self, plan: _Plan, first: int, last: int) -> Batch:
        """The samples from place ``first`` to ``last`` of the epoch's order."""
        rows = plan.order[first:last]
        stored = self.samples.inputs.index_select(0, rows)
        views = {}
        for name, augmentation in self._changes.items():
            draws = {key: value[first:last] for key, value in plan.draws[name].items()}
            views[name] = self._finish(augmentation.apply(stored, draws))
        inputs = views.pop(INPUTS) if INPUTS in views else self._finish(stored)
        target = self.samples.target.index_select(0, rows)
        return Batch(inputs, target, self.samples.index.index_select(0, rows), views=views)

    def _finish(self, x: Tensor) -> Tensor:
        """The last step of a batch: normalisation, type and memory format."""
        dtype, channels_last = self.options.dtype, self.options.channels_last and x.ndim == 4
        if self._normalisation is not None:
            return self._normalisation(x, dtype=dtype, channels_last=channels_last)
        return x.to(dtype, memory_format=_FORMAT[channels_last])
