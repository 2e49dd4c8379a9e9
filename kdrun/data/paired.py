"""Labelled batches with unlabelled ones beside them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from kdrun.data.loader import Loader
from kdrun.outputs import Batch


class PairedLoader:
    """Batches of labelled samples, each with a batch of unlabelled ones as ``Batch.unlabelled``.

    Step ``s`` of training, counted over epochs, takes batch ``s`` of each loader's endless sequence
    of epochs; so a loader that is shorter than an epoch starts over within it, in another order,
    and a longer one goes on in the next epoch where it stopped. See ``kdrun.data.loader.Loader``.

    Args:
        labelled: batches with labels.
        unlabelled: batches whose labels are hidden; None: the labelled ones come alone.
        steps: batches in an epoch.
        restart: both loaders start over with each epoch, so what is longer is cut off.
    """

    def __init__(
        self, labelled: Loader, unlabelled: Loader | None, *, steps: int, restart: bool = False
    ) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled
        self.steps, self.restart = steps, restart
        self._epoch, self._start = 0, 0

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and how many of its first batches to leave out."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self._epoch, self._start
        labelled = self._from(self.labelled, epoch, start)
        if self.unlabelled is None:
            yield from itertools.islice(labelled, self.steps - start)
            return
        unlabelled = self._from(self.unlabelled, epoch, start)
        for _ in range(start, self.steps):
            yield replace(next(labelled), unlabelled=next(unlabelled))

    def replay(self, epoch: int, position: int) -> Batch:
        """One batch of any epoch again, bit for bit.

        Raises:
            IndexError: if the epoch has no batch ``position``.
        """
        if not 0 <= position < self.steps:
            raise IndexError(f"batch {position} of {self.steps}")
        batch = self.labelled.replay(*self._place(self.labelled, epoch, position))
        if self.unlabelled is None:
            return batch
        place = self._place(self.unlabelled, epoch, position)
        return replace(batch, unlabelled=self.unlabelled.replay(*place))

    def _place(self, loader: Loader, epoch: int, position: int) -> tuple[int, int]:
        """Which epoch and batch of a loader a batch of this one is made of."""
        if self.restart:
            return epoch, position
        return divmod(epoch * self.steps + position, len(loader))

    def _from(self, loader: Loader, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of a loader from a place on, without end."""
        epoch, start = self._place(loader, epoch, start)
        for further in itertools.count():
            loader.set_epoch(epoch + further, 0 if further else start)
            yield from loader
