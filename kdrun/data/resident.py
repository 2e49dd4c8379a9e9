"""Data sets that fit: one tensor on the device of the networks, batches made there by indexing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrun.data.batches import BatchMaker, Preprocessing, Shape
from kdrun.data.loader import LoaderOptions
from kdrun.errors import UserError
from kdrun.outputs import Batch

# Sets below this size are normalised once instead of batch by batch.
NORMALISE_ONCE_BYTES = 64 << 20


@dataclass(slots=True)
class Samples:
    """The samples of one part of a data set, in memory.

    Attributes:
        inputs: ``(N, ...)`` as stored, e.g. uint8 images ``(N, C, H, W)``; or several such by
            name, which come as they are stored, neither normalised nor augmented.
        target: ``(N,)`` int64.
        index: ``(N,)`` int64, the stable number of each sample in the original set.
        content: hash of the original set's inputs, from which ``index`` chose these; computed
            when it is not given.
    """

    inputs: Tensor | dict[str, Tensor]
    target: Tensor
    index: Tensor
    content: str = ""
    _copies: dict[torch.device, Samples] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.content:
            digest = hashlib.sha256()
            named = self.inputs if isinstance(self.inputs, dict) else {"": self.inputs}
            for name, inputs in named.items():
                digest.update(f"{name}{inputs.dtype} {tuple(inputs.shape)}".encode())
                digest.update(inputs.cpu().contiguous().numpy())
            self.content = digest.hexdigest()

    def __len__(self) -> int:
        return self.target.shape[0]

    @property
    def shape(self) -> Shape:
        """The shape of one input; by name where there are several."""
        if isinstance(self.inputs, dict):
            return {name: tuple(inputs.shape[1:]) for name, inputs in self.inputs.items()}
        return tuple(self.inputs.shape[1:])

    def take(self, rows: Tensor) -> Samples:
        """The given rows as a part of their own; without a copy if they are all rows in order."""
        if rows.shape[0] == len(self) and torch.equal(rows, torch.arange(len(self))):
            return self
        inputs = each(self.inputs, lambda values: values[rows])
        return Samples(inputs, self.target[rows], self.index[rows], self.content)

    def without_labels(self) -> Samples:
        """The same samples with -1 for each target, so that nothing can read it."""
        hidden = torch.full_like(self.target, -1)
        return Samples(self.inputs, hidden, self.index, self.content)

    def serve(self, options: LoaderOptions, preprocessing: Preprocessing) -> ResidentLoader:
        """Batches of these samples; they are sent to a device once for all its loaders.

        Raises:
            UserError: if they do not fit there.
        """
        device = torch.device(options.device)
        if device not in self._copies:
            try:
                inputs = each(self.inputs, lambda values: values.to(device))
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{len(self):,} samples do not fit into the memory of {device}; images need "
                    "not: dataset.storage=stream"
                ) from error
            self._copies[device] = Samples(
                inputs, self.target.to(device), self.index.to(device), self.content
            )
        return ResidentLoader(self._copies[device], options, preprocessing)


def each(
    inputs: Tensor | dict[str, Tensor], change: Callable[[Tensor], Tensor]
) -> Tensor | dict[str, Tensor]:
    """``change`` applied to the inputs, to each of them where there are several."""
    if isinstance(inputs, dict):
        return {name: change(values) for name, values in inputs.items()}
    return change(inputs)


class ResidentLoader:
    """Batches of samples that live on the device; see ``kdrun.data.loader.Loader``.

    Args:
        samples: on ``options.device``.
        options: batch size, seed, rank, type and so on.
        preprocessing: normalisation and augmentation.
    """

    def __init__(
        self,
        samples: Samples,
        options: LoaderOptions,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.options = options
        self._target, self._index = samples.target, samples.index
        self._inputs = samples.inputs
        self._maker = BatchMaker(
            len(samples), samples.shape, options, preprocessing or Preprocessing()
        )
        if isinstance(samples.inputs, dict):
            self._ready = True
        else:
            small = samples.inputs.numel() * 4 <= NORMALISE_ONCE_BYTES
            self._ready = self._maker.changes_nothing and small
            if self._ready:
                self._inputs = self._maker.finish(samples.inputs)
        self._epoch, self._start = 0, 0

    def __len__(self) -> int:
        return self.options.batches(self._maker.size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and how many of its first batches to leave out."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        for position in range(self._start, len(self)):
            yield self.replay(epoch, position)

    def replay(self, epoch: int, position: int) -> Batch:
        """One batch of any epoch again, bit for bit."""
        plan = self._maker.plan(epoch)
        rows = self._maker.span(position).cut(plan.order)
        stored = each(self._inputs, lambda values: values.index_select(0, rows))
        target, index = self._target.index_select(0, rows), self._index.index_select(0, rows)
        if self._ready:
            number = self._maker.augmentation(epoch)
            inputs = each(stored, self._arrange)
            views = dict.fromkeys(self.options.views, inputs)
            return Batch(inputs, target, index, views=views, augmentation=number)
        everywhere = dict.fromkeys(self._maker.changes, stored)
        return self._maker.make(everywhere, target, index, plan, position)

    def _arrange(self, values: Tensor) -> Tensor:
        is_number_of_something = isinstance(self._inputs, dict) and not values.is_floating_point()
        return values if is_number_of_something else self._maker.arrange(values)
