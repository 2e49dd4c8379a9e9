"""Image files with their classes: a folder per class, or a list."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdrun.data.sources import content_of, data_files
from kdrun.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")

ANNOTATIONS = "val_annotations.txt"
"""In the archive of Tiny ImageNet: each image of ``val/images`` and its class, divided by tabs."""


@dataclass
class FolderSource:
    """Image files, each with its class.

    ``files`` is one block of memory, ``(N,)`` bytes: of a list of a million names, every worker
    process would come to hold a copy.
    """

    files: np.ndarray
    target: Tensor
    class_names: list[str]
    content: str

    def read(self, number: int) -> bytes:
        """The bytes of the file."""
        with open(self.files[number], "rb") as file:
            return file.read()

    def where(self, number: int) -> str:
        """The file."""
        return os.fsdecode(self.files[number])


def is_folder_layout(root: Path, split: str) -> bool:
    """Whether ``<root>/<split>/`` holds a folder per class."""
    return bool(_folders_in(root / split))


def split_folder(root: Path, split: str) -> Path:
    """``<root>/<split>``.

    Raises:
        UserError: if it is not there; names the folders that are.
    """
    folder = root / split
    if not folder.is_dir():
        present = ", ".join(_folders_in(root)) or "no folder"
        raise UserError(f"{root} has no split {split!r}; it has {present}")
    return folder


def open_folder(root: Path, split: str) -> FolderSource:
    """The images below ``<root>/<split>``, of classes in alphabetical order, as in torchvision.

    They lie in ``<class>/``, at any depth, or are told apart by ``ANNOTATIONS``. What is hidden is
    passed over.

    Raises:
        UserError: if there is no such split, or a class without images; names the folder.
    """
    folder = split_folder(root, split)
    if (folder / ANNOTATIONS).is_file():
        return _open_annotated(folder, root)
    class_names = _folders_in(folder)
    if not class_names:
        raise UserError(f"{folder} has no class folders, so the classes of its images are unknown")
    files: list[os.DirEntry[str]] = []
    counts = []
    for name in class_names:
        found = [
            entry
            for entry in data_files(folder / name)
            if entry.name.lower().endswith(IMAGE_SUFFIXES)
        ]
        if not found:
            raise UserError(f"{folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        files += found
        counts.append(len(found))
    target = torch.arange(len(class_names)).repeat_interleave(torch.tensor(counts))
    return FolderSource(_block(files), target, class_names, content_of(files, root))


def _open_annotated(folder: Path, root: Path) -> FolderSource:
    annotations = folder / ANNOTATIONS
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {annotations}: {error}") from error
    files, labels = [], []
    for number, line in enumerate(lines, start=1):
        name, divided, rest = line.partition("\t")
        if not divided:
            raise UserError(f"{annotations}, line {number}: no image and class divided by a tab")
        files.append(folder / "images" / name)
        labels.append(rest.partition("\t")[0])
    if not files:
        raise UserError(f"{annotations} is empty")
    class_names = sorted(set(labels))
    ids = {name: number for number, name in enumerate(class_names)}
    target = torch.tensor([ids[label] for label in labels])
    return FolderSource(_block(files), target, class_names, content_of(files, root))


def _folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder but hidden ones; none where it is no folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _block(files: Iterable[os.PathLike[str]]) -> np.ndarray:
    return np.array([os.fsencode(file) for file in files])
