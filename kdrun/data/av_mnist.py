"""AV-MNIST: written digits paired with spectrograms of spoken ones, as arrays in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdrun.data.batches import Preprocessing
from kdrun.data.module import DataModule
from kdrun.data.resident import Samples
from kdrun.data.seeding import stream
from kdrun.data.sources import content_of, data_folder
from kdrun.errors import UserError
from kdrun.parameters import NonNegativeInt


class AVMNIST(DataModule):
    """The arrays as MultiBench distributes them, pooled and split 60 / 20 / 20 as in MST-Distill.

    ``<folder>/image/{train,test}_data.npy`` ``(N, 784)`` or ``(N, 28, 28)`` and
    ``<folder>/audio/{train,test}_data.npy`` ``(N, 112, 112)``, values 0 to 255, and
    ``<folder>/{train,test}_labels.npy`` ``(N,)`` (names from memory of that code). Samples have the
    inputs ``image`` ``(1, 28, 28)`` and ``audio`` ``(1, 112, 112)`` in [0, 1], kept in half
    precision: about 2 GB for the 70,000 pairs.

    Args:
        name: the folder, or its name below ``KDRUN_DATA``.
        split_seed: of the random permutation that is cut into the three parts.
    """

    def __init__(self, *, name: str = "avmnist", split_seed: NonNegativeInt = 0) -> None:
        super().__init__(val_fraction=0.0, preprocessing=Preprocessing())
        self.name = name
        self.split_seed = split_seed

    def load(self) -> dict[str, Samples]:
        """The three parts."""
        folder = data_folder(self.name)
        if folder is None:
            raise UserError(
                f"dataset.name={self.name}: no such folder below KDRUN_DATA; AV-MNIST comes from "
                "MultiBench and is not on the hub"
            )
        target = _pooled(folder, "{}_labels.npy").long()
        image = _pooled(folder, "image/{}_data.npy").half().div_(255).reshape(-1, 1, 28, 28)
        audio = _pooled(folder, "audio/{}_data.npy").half().div_(255).unsqueeze(1)
        sizes = {"labels": len(target), "images": len(image), "spectrograms": len(audio)}
        if len(set(sizes.values())) > 1:
            counted = ", ".join(f"{count} {what}" for what, count in sizes.items())
            raise UserError(f"{folder} does not hold pairs: {counted}")
        self.class_names = [str(digit) for digit in range(int(target.max()) + 1)]
        files = sorted(folder.rglob("*.npy"))
        content = hashlib.sha256(content_of(files, folder).encode()).hexdigest()
        everything = Samples(
            {"image": image, "audio": audio}, target, torch.arange(len(target)), content
        )
        order = torch.randperm(len(target), generator=stream(self.split_seed))
        first, second = round(0.6 * len(target)), round(0.8 * len(target))
        cuts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
        return {part: everything.take(rows.sort().values) for part, rows in cuts.items()}


def _pooled(folder: Path, pattern: str) -> Tensor:
    """The arrays of the training and the test file, one after the other."""
    arrays = []
    for split in ("train", "test"):
        path = folder / pattern.format(split)
        try:
            arrays.append(torch.from_numpy(np.load(path, allow_pickle=False)))
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    return torch.cat(arrays)
