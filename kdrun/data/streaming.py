"""Image sets that do not fit in memory: decoded and cropped by worker processes.

A worker makes uint8 crops of one size; everything after that - flips, colour policies, mixing,
normalisation - happens on whole batches on the device, as for sets in memory. What is random about
a crop depends on (seed, epoch, sample, view) alone, so neither the number of workers nor where a
run was resumed changes a batch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdrun.cores import usable_cores
from kdrun.data.batches import BatchMaker, Preprocessing
from kdrun.data.decode import decode, resize_and_crop, to_array
from kdrun.data.loader import LoaderOptions
from kdrun.data.seeding import stream_seed
from kdrun.data.sources import ImageSource
from kdrun.errors import UserError
from kdrun.outputs import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

CROP = 3
"""What the random stream of a crop is for, after seed and epoch; see ``kdrun.data.loader``."""

RATIO = (3 / 4, 4 / 3)

if sys.platform != "win32":
    # A worker is a copy of this process. What Python's collector would find in it to throw away,
    # above all the workers of an earlier loader, is not its own; to visit it copies its memory.
    os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True)
class Geometry:
    """How an image of any size becomes one of ``size`` pixels square.

    Attributes:
        size: side of the result in pixels.
        resize: shorter side before the central crop of evaluation.
        crop_scale: range of the area of a random resized crop, as shares of the image; None trains
            on the central crop.
        channels: 1 or 3.
    """

    size: int
    resize: int
    crop_scale: tuple[float, float] | None
    channels: int = 3


@dataclass
class StreamedSamples:
    """The samples of one part of a data set, read when they are needed.

    Attributes:
        source: of the whole original split.
        target: ``(N,)`` int64, of this part.
        index: ``(N,)`` int64, numbers in ``source``.
        content: hash of the source and the geometry.
        geometry: of the crops.
        workers: processes that decode; 0 decodes in this one.
    """

    source: ImageSource
    target: Tensor
    index: Tensor
    content: str
    geometry: Geometry
    workers: int

    def __len__(self) -> int:
        return self.target.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return (self.geometry.channels, self.geometry.size, self.geometry.size)

    def take(self, rows: Tensor) -> StreamedSamples:
        """The given rows as a part of their own."""
        return StreamedSamples(
            self.source,
            self.target[rows],
            self.index[rows],
            self.content,
            self.geometry,
            self.workers,
        )

    def without_labels(self) -> StreamedSamples:
        """The same samples with -1 for each target, so that nothing can read it."""
        return replace(self, target=torch.full_like(self.target, -1))

    def serve(self, options: LoaderOptions, preprocessing: Preprocessing) -> StreamLoader:
        """Batches of these samples."""
        return StreamLoader(self, options, preprocessing)


class StreamLoader:
    """Batches of samples that workers decode; see ``kdrun.data.loader.Loader``.

    Args:
        samples: what to serve.
        options: batch size, seed, rank, type and so on.
        preprocessing: normalisation and augmentation.
    """

    def __init__(
        self, samples: StreamedSamples, options: LoaderOptions, preprocessing: Preprocessing
    ) -> None:
        # Here, before the workers are forked: they need not import it, each by itself and perhaps
        # while another thread of this process holds a lock of the import system.
        import torchvision.transforms.v2  # noqa: F401

        self.options = options
        self._samples = samples
        self._maker = BatchMaker(len(samples), samples.shape, options, preprocessing)
        self._places = _Places(self._maker)
        crops = _Crops(samples, options, tuple(self._maker.changes))
        self._crops = crops
        self._pinned = torch.device(options.device).type == "cuda"
        self._workers = DataLoader(
            crops,
            batch_sampler=self._places,
            num_workers=samples.workers,
            collate_fn=_as_it_is,
            persistent_workers=samples.workers > 0,
            worker_init_fn=_heed_main_process_alone,
            pin_memory=self._pinned,
            generator=torch.Generator(),  # otherwise each epoch would advance the global one
        )
        # Python's collector takes what a circle holds apart in any order, and a worker whose queue
        # is gone first is waited for five seconds. What is held here goes in its own order.
        weakref.finalize(self, _let_go, self._workers).atexit = False

    def __len__(self) -> int:
        return self.options.batches(len(self._samples))

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and how many of its first batches to leave out."""
        self._places.epoch, self._places.start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self._places.epoch, self._places.start
        with _deaf_to_sigterm():
            batches = iter(self._workers)  # starts them, the first time
        for position, fetched in enumerate(batches, start):
            yield self._batch(fetched, epoch, position)

    def replay(self, epoch: int, position: int) -> Batch:
        """One batch of any epoch again, bit for bit."""
        return self._batch(
            self._crops.__getitems__(self._places.of(epoch, position)), epoch, position
        )

    def _batch(
        self, fetched: tuple[dict, Tensor, Tensor] | str, epoch: int, position: int
    ) -> Batch:
        if isinstance(fetched, str):
            raise UserError(fetched)
        crops, target, index = fetched
        device = self.options.device
        stored = {name: crop.to(device, non_blocking=self._pinned) for name, crop in crops.items()}
        target = target.to(device, non_blocking=self._pinned)
        index = index.to(device, non_blocking=self._pinned)
        return self._maker.make(stored, target, index, self._maker.plan(epoch), position)


class _Places(Sampler):
    """Which rows each batch of the chosen epoch needs; every row comes with its epoch."""

    def __init__(self, maker: BatchMaker) -> None:
        self.maker = maker
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.maker.options.batches(self.maker.size) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch  # batches are asked for ahead of their use
        for position in range(self.start, self.start + len(self)):
            yield self.of(epoch, position)

    def of(self, epoch: int, position: int) -> list[tuple[int, int]]:
        """``(epoch, row)`` of every sample of a batch."""
        rows = self.maker.span(position).cut(self.maker.order(epoch))
        return [(epoch, row) for row in rows.tolist()]


class _Crops(Dataset):
    """Runs in the workers: reads, decodes and crops the samples of a batch."""

    def __init__(
        self, samples: StreamedSamples, options: LoaderOptions, views: tuple[str, ...]
    ) -> None:
        self.samples, self.options, self.views = samples, options, views

    def __getitems__(self, places: list[tuple[int, int]]) -> tuple[dict, Tensor, Tensor] | str:
        """Crops by view ``(B, C, H, W)`` uint8, targets and indices; or what went wrong.

        An exception would reach the main process wrapped in a traceback.
        """
        shape = (len(places), *self.samples.shape)
        crops = {name: np.empty(shape, np.uint8) for name in self.views}
        try:
            for number, (epoch, row) in enumerate(places):
                index = int(self.samples.index[row])
                image = decode(self.samples.source, index, shape[1])
                for name in self.views:
                    named = self.options.augmentation(epoch)
                    words = (*named, CROP, zlib.crc32(name.encode()), index)
                    crops[name][number] = to_array(self._crop(image, words))
        except UserError as error:
            return str(error)
        rows = torch.tensor([row for _, row in places], dtype=torch.int64)
        tensors = {name: torch.from_numpy(crop) for name, crop in crops.items()}
        return tensors, self.samples.target[rows], self.samples.index[rows]

    def _crop(self, image: Image, words: tuple[int, ...]) -> Image:
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.v2 import functional

        geometry = self.samples.geometry
        if not self.options.augment or geometry.crop_scale is None:
            return resize_and_crop(image, geometry.resize, geometry.size)
        # torchvision draws from the CPU's global generator, which is left as it was. That of a GPU,
        # where dropout draws, would be set by ``torch.manual_seed`` as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(*words))
            place = RandomResizedCrop.get_params(image, list(geometry.crop_scale), list(RATIO))
        return functional.resized_crop(image, *place, [geometry.size, geometry.size])


@contextlib.contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """What this thread starts never receives SIGTERM unless it asks (``_heed_main_process_alone``).

    Who stops a job signals all its processes. The main process then finishes its step and saves,
    for which it needs its workers, and ends them itself. Only Linux tells who has sent a signal.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_main_process_alone(worker: int) -> None:
    """In a worker: wait beside the work for a SIGTERM of the main process."""
    if sys.platform == "linux":
        threading.Thread(target=_await_end, args=(os.getppid(),), daemon=True).start()


def _await_end(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)


def _let_go(workers: DataLoader) -> None:
    """Nothing but to have held them until now."""


def _as_it_is(fetched: tuple[dict, Tensor, Tensor] | str) -> tuple[dict, Tensor, Tensor] | str:
    return fetched


def default_workers() -> int:
    """Worker processes per loader, at most 16: the cores of this process, divided among those that
    torchrun has started on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(usable_cores() // processes, 1), 16)
