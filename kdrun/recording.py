"""Outputs of a frozen network for every training sample: written once, looked up ever after.

A recording holds the outputs for a few random augmentations of each sample (``AugmentationCycle``);
the loader shows the same ones, so (sample, augmentation) names an output. Layout of its directory::

    recording.json                       what was recorded
    index.0.npy                          (N,) int64, the sample in each row
    <view>.<array>.<augmentation>.npy    (N, ...), one array for one augmentation

An array file appears whole: an interrupted recording goes on at its first missing augmentation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from kdrun import distributed
from kdrun.data.loader import AugmentationCycle
from kdrun.errors import UserError
from kdrun.files import read_json, write_json
from kdrun.outputs import Batch, ModelOutput
from kdrun.sizes import in_words

DESCRIPTION = "recording.json"
INPUTS = "inputs"
"""The name of the batch's own inputs among the views."""
RESIDENT_BYTES = 2 << 30
"""Arrays of one augmentation up to this size are kept whole on an accelerator; a step then asks the
host for nothing."""

Arrays = dict[str, Tensor]


class Encoding(Protocol):
    """How the output on one view is kept."""

    def description(self) -> dict[str, Any]:
        """What names the encoding, as plain values."""

    def encode(self, output: ModelOutput) -> Arrays:
        """The arrays ``(B, ...)`` to keep."""

    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> ModelOutput:
        """The output again, floating-point values as ``dtype``."""


@dataclass(frozen=True)
class Dense:
    """Logits as they are, and tapped features.

    Attributes:
        dtype: of everything that is kept.
        features: names of the tapped activations to keep.
    """

    dtype: torch.dtype
    features: tuple[str, ...] = ()

    def description(self) -> dict[str, Any]:
        """Type and features."""
        return {"dtype": str(self.dtype), "features": list(self.features)}

    def encode(self, output: ModelOutput) -> Arrays:
        """Logits ``(B, C)`` and every feature.

        Raises:
            UserError: a value is not finite, or exceeds the range of the type.
        """
        arrays = {"logits": output.dense_logits}
        for number, name in enumerate(self.features):
            arrays[f"feature{number}"] = output.features[name]
        return {name: _narrowed(values, self.dtype) for name, values in arrays.items()}

    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> ModelOutput:
        """Logits and features."""
        features = {
            name: arrays[f"feature{number}"].to(dtype) for number, name in enumerate(self.features)
        }
        return ModelOutput(arrays["logits"].to(dtype), features)


@dataclass(frozen=True)
class TopK:
    """The ``k`` most probable classes; the rest of the mass is spread evenly over the others.

    Kept are ``k`` log-probabilities, the logarithm of the rest's mass, and ``k`` class ids:
    ``4 k + 2`` bytes in half precision below 32,768 classes. Decoding gives log-probabilities of
    all classes as logits, whose softmax sums to one.

    This is an approximation. At temperature 1 the divergence from the true distribution is
    ``r (log(C - k) - H)``, with ``r`` the rest's mass and ``H`` the entropy of the classes within
    it, so at most ``r log(C - k)`` nats. A temperature above 1 raises the share of the rest, and
    what the teacher knows among those classes is lost. Log-probabilities differ from logits by a
    constant per sample, which matters to methods that compare logits without a softmax.

    Attributes:
        k: classes that are kept, fewer than there are.
        classes: C, all classes.
        dtype: of the log-probabilities.
    """

    k: int
    classes: int
    dtype: torch.dtype

    def description(self) -> dict[str, Any]:
        """Number of classes and type."""
        return {"dtype": str(self.dtype), "top_k": self.k}

    def encode(self, output: ModelOutput) -> Arrays:
        """``log_probabilities (B, k + 1)``, largest first and the rest's last; ``ids (B, k)``."""
        full = output.dense_logits
        full = full if full.dtype == torch.float64 else full.float()
        ranked, ids = full.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        rest = ranked[..., self.k :].logsumexp(-1, keepdim=True)
        kept = torch.cat([ranked[..., : self.k], rest], -1)
        ids = ids[..., : self.k].to(torch.int16 if self.classes <= 1 << 15 else torch.int32)
        return {"log_probabilities": _narrowed(kept, self.dtype), "ids": ids}

    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> ModelOutput:
        """Log-probabilities ``(B, C)`` as logits."""
        kept = arrays["log_probabilities"].to(dtype)
        share = kept[..., -1:] - np.log(self.classes - self.k)
        logits = share.expand(*kept.shape[:-1], self.classes)
        logits = logits.scatter(-1, arrays["ids"].long(), kept[..., :-1])
        return ModelOutput(logits.log_softmax(-1))


def encode_views(encoding: Encoding, output: ModelOutput) -> Arrays:
    """The arrays of an output and of its views, by ``<view>.<array>``."""
    views = {INPUTS: output, **output.views}
    return {
        f"{view}.{name}": values
        for view, one in views.items()
        for name, values in encoding.encode(one).items()
    }


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    values = values.detach()
    narrow = values.to(dtype)
    if not bool(values.isfinite().all()):
        raise UserError("the teacher gives outputs that are not finite: nothing can learn from it")
    if not bool(narrow.isfinite().all()):
        raise UserError(
            f"the teacher's outputs reach {values.abs().max():.3g}, beyond the range of fp16; "
            "set teacher.cache_dtype=fp32"
        )
    return narrow


# -- writing ---------------------------------------------------------------------------------------


def array_path(directory: Path, name: str, augmentation: int) -> Path:
    """The file of one array for one augmentation."""
    return directory / f"{name}.{augmentation}.npy"


def is_written(directory: Path, augmentation: int, rows: int, sample: Mapping[str, Tensor]) -> bool:
    """Whether an earlier attempt has left all arrays of an augmentation, none of them torn.

    Args:
        directory: of the recording.
        augmentation: its number.
        rows: samples that it must have.
        sample: the arrays of a few samples.
    """
    arrays = {name: values.cpu().numpy() for name, values in sample.items()}
    if augmentation == 0:
        arrays["index"] = np.zeros(1, np.int64)
    for name, like in arrays.items():
        try:
            found = np.load(array_path(directory, name, augmentation), mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):
            return False
        if found.shape != (rows, *like.shape[1:]) or found.dtype != like.dtype:
            return False
    return True


def refuse_without_space(directory: Path, size: int) -> None:
    """Check that ``size`` bytes fit; a memory-mapped write to a full disk would kill the process.

    Raises:
        UserError: they do not.
    """
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UserError(
            f"recording the teacher takes {in_words(size)}, but {directory} has {in_words(free)} "
            "left; lower teacher.cache_views, or set teacher.cache=topk"
        )


def write_augmentation(
    directory: Path,
    augmentation: int,
    rows: int,
    pieces: Iterable[tuple[slice, Mapping[str, Tensor]]],
) -> None:
    """Write all arrays of one augmentation; in a distributed run every rank writes its own rows.

    Args:
        directory: of the recording.
        augmentation: its number.
        rows: samples of all ranks together.
        pieces: rows and their arrays, batch by batch.
    """
    files: dict[str, np.memmap] = {}
    for place, arrays in pieces:
        host = {name: values.cpu().numpy() for name, values in arrays.items()}
        if not files:
            files = _create(directory, augmentation, rows, host)
        for name, values in host.items():
            files[name][place] = values
    for file in files.values():
        file.flush()
    distributed.barrier()
    if distributed.rank() == 0:
        for name in files:
            path = array_path(directory, name, augmentation)
            os.replace(_unfinished(path), path)
    distributed.barrier()


def _create(
    directory: Path, augmentation: int, rows: int, first: Mapping[str, np.ndarray]
) -> dict[str, np.memmap]:
    paths = {name: _unfinished(array_path(directory, name, augmentation)) for name in first}
    if distributed.rank() == 0:
        for name, values in first.items():
            open_memmap(paths[name], "w+", values.dtype, (rows, *values.shape[1:])).flush()
    distributed.barrier()
    return {name: open_memmap(path, "r+") for name, path in paths.items()}


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


# -- reading ---------------------------------------------------------------------------------------


class Recording:
    """Gives the outputs of a recorded network in place of running it.

    The arrays are memory-mapped. On the CPU a batch is read straight from the page cache; on an
    accelerator the arrays of the current augmentation are sent there once if they are small, else
    batch by batch, which waits for the device once per step.

    Args:
        directory: of a finished recording.
        encoding: how outputs are kept.
        views: names of the further views that were recorded.
        cycle: the augmentations that were recorded.
        expected: the description that the recording must have.
        dtype: of the outputs.

    Raises:
        UserError: the recording is of something else; says what differs.
    """

    def __init__(
        self,
        directory: Path,
        encoding: Encoding,
        *,
        views: Sequence[str],
        cycle: AugmentationCycle,
        expected: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.directory, self.encoding, self.views = directory, encoding, tuple(views)
        self.cycle, self.dtype = cycle, dtype
        recorded = read_json(directory / DESCRIPTION)
        differing = [
            f"{name} is {expected.get(name)}, recorded was {recorded.get(name)}"
            for name in dict.fromkeys([*expected, *recorded])
            if expected.get(name) != recorded.get(name)
        ]
        if differing:
            raise UserError(
                f"the teacher's outputs in {directory} are not this run's: {'; '.join(differing)}"
            )
        index = torch.from_numpy(np.load(array_path(directory, "index", 0)))
        self._rows = torch.full((int(index.max()) + 1,), -1)
        self._rows[index] = torch.arange(len(index))
        self._current: tuple[int, Arrays] = (-1, {})

    def to(self, device: torch.device | str) -> Recording:
        """Look up, and give outputs, on ``device``."""
        self._rows = self._rows.to(device)
        self._current = (-1, {})
        return self

    def __call__(self, batch: Batch) -> ModelOutput:
        """The outputs on a batch and its views."""
        arrays = self.stored(batch)
        output = self._decoded(arrays, INPUTS)
        output.views = {view: self._decoded(arrays, view) for view in self.views}
        return output

    def stored(self, batch: Batch) -> Arrays:
        """What is kept of a batch, by ``<view>.<array>``."""
        rows = self._rows[batch.index]
        found = {}
        for name, values in self._arrays(batch.augmentation).items():
            if values.device == rows.device:
                found[name] = values[rows]
            else:
                found[name] = values[rows.cpu()].to(rows.device)
        return found

    def check(self, run: Callable[[Batch], ModelOutput], batch: Batch, tolerance: float) -> None:
        """Run the network on a few samples and compare.

        Args:
            run: gives the network's live output on a batch and its views.
            batch: of the loader that will train.
            tolerance: largest difference as a share of the largest value.

        Raises:
            UserError: recorded and live outputs differ.
        """
        live, kept = encode_views(self.encoding, run(batch)), self.stored(batch)
        for name, values in live.items():
            if not values.is_floating_point():
                continue  # Class ids; two of them may change places where they are as good as tied.
            largest = float(values.float().abs().max())
            difference = float((values.float() - kept[name].float()).abs().max())
            if not difference <= tolerance * largest:
                raise UserError(
                    f"the teacher's outputs in {self.directory} do not belong to this run's "
                    f"batches: {name} of augmentation {batch.augmentation} is off by "
                    f"{difference:.3g} where values reach {largest:.3g}; remove the directory to "
                    "record again"
                )

    def _decoded(self, arrays: Arrays, view: str) -> ModelOutput:
        prefix = f"{view}."
        own = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
        return self.encoding.decode(own, self.dtype)

    def _arrays(self, augmentation: int) -> Arrays:
        if self._current[0] != augmentation:
            arrays = {}
            for path in sorted(self.directory.glob(f"*.{augmentation}.npy")):
                name = path.name.removesuffix(f".{augmentation}.npy")
                if name != "index":
                    # Mapped copy-on-write, because torch knows no read-only tensors.
                    arrays[name] = torch.from_numpy(np.load(path, mmap_mode="c"))
            if sum(values.nbytes for values in arrays.values()) <= RESIDENT_BYTES:
                arrays = {name: values.to(self._rows.device) for name, values in arrays.items()}
            self._current = (augmentation, arrays)
        return self._current[1]


def describe(directory: Path, description: Mapping[str, Any]) -> None:
    """Write what a recording is of."""
    write_json(directory / DESCRIPTION, description)
