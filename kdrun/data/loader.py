"""What every loader offers, and the order in which samples come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdrun.data.seeding import stream
from kdrun.outputs import Batch

ORDER, AUGMENTATION, MIXING = 0, 1, 2
"""What a random stream is for: the third word of its name, after seed and epoch."""


class Loader(Protocol):
    """Batches of one split on the device of the networks.

    Order and augmentation depend on (seed, epoch) and on nothing that happened before, so a loader
    can be put at any batch of any epoch, and any batch can be made again.
    """

    def __len__(self) -> int:
        """Batches in an epoch."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what the next iteration gives: ``epoch`` without its first ``start`` batches."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the chosen epoch from the chosen start on."""

    def replay(self, epoch: int, position: int) -> Batch:
        """Batch number ``position`` of ``epoch``, identical to what iteration gives there."""


@dataclass(frozen=True, slots=True)
class AugmentationCycle:
    """Few augmentations, taken in turn, where every epoch would have its own.

    Epoch ``e`` is augmented as a loader with ``seed`` augments epoch ``e % length``; the order of
    the samples still differs in every epoch.
    """

    seed: int
    length: int


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """How a split is to be served; what it holds is the data set's business.

    Attributes:
        batch_size: of the global batch, summed over ranks.
        device: where batches are made.
        seed: of order and augmentation.
        rank: this process.
        world_size: number of processes.
        views: names of further augmented views wanted in ``Batch.views``.
        augment: false for the stored samples, normalised only.
        shuffle: a new random order each epoch.
        drop_last: leave out a last batch that is not full.
        dtype: of the inputs.
        channels_last: memory format of image inputs.
        cycle: which augmentations are used; None: those of ``seed``, another in every epoch.
        draws: samples drawn in an epoch, with replacement; None: each once.
    """

    batch_size: int
    device: torch.device | str = "cpu"
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    views: tuple[str, ...] = ()
    augment: bool = False
    shuffle: bool = False
    drop_last: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    cycle: AugmentationCycle | None = None
    draws: int | None = None

    def augmentation(self, epoch: int) -> tuple[int, int]:
        """Seed and number of the augmentation of an epoch."""
        if self.cycle is None:
            return self.seed, epoch
        return self.cycle.seed, epoch % self.cycle.length

    def batches(self, size: int) -> int:
        """Batches in an epoch of ``size`` samples; the last may be short unless it is dropped."""
        size = size if self.draws is None else self.draws
        return size // self.batch_size if self.drop_last else -(-size // self.batch_size)

    def samples(self, size: int, position: int) -> int:
        """Samples of the global batch ``position`` in an epoch of ``size`` samples."""
        size = size if self.draws is None else self.draws
        return min(self.batch_size, size - position * self.batch_size)

    def bounds(self, size: int, position: int) -> tuple[int, int]:
        """First and last + 1 place in the epoch's order of this rank's part of a global batch.

        A short last batch is divided as evenly as it can be; a rank may then hold one fewer.

        Raises:
            IndexError: if the epoch has no batch ``position``.
        """
        if not 0 <= position < self.batches(size):
            raise IndexError(f"batch {position} of {self.batches(size)}")
        first = position * self.batch_size
        count = self.samples(size, position)
        return (
            first + count * self.rank // self.world_size,
            first + count * (self.rank + 1) // self.world_size,
        )

    def order(self, size: int, epoch: int) -> Tensor:
        """The order of ``size`` samples in an epoch, ``(size,)`` int64 on the CPU; or which of
        them are drawn, ``(draws,)``."""
        if self.draws is not None:
            return torch.randint(size, (self.draws,), generator=stream(self.seed, epoch, ORDER))
        if not self.shuffle:
            return torch.arange(size)
        return torch.randperm(size, generator=stream(self.seed, epoch, ORDER))
