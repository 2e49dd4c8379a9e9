"""Encoded images with their classes: a hub data set, the same layout on disk, or class folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kdrun.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")


class ImageSource(Protocol):
    """The images of one split, encoded, read one by one.

    Attributes:
        target: ``(N,)`` int64 class ids.
        class_names: by class id.
        content: hash of what the source holds.
    """

    target: Tensor
    class_names: list[str]
    content: str

    def read(self, number: int) -> bytes:
        """The encoded image."""

    def where(self, number: int) -> str:
        """Where that image comes from, for error messages."""


def data_folder(name: str) -> Path | None:
    """The local folder of a data set: ``name`` below ``KDRUN_DATA``, or ``name`` as a path.

    Returns None where neither exists; the hub is asked then.

    Raises:
        UserError: if ``KDRUN_DATA`` names no folder, ``name`` is a file, or an explicit path
            (``/x``, ``./x``, ``~/x``) does not exist.
    """
    root = os.environ.get("KDRUN_DATA")
    if root and not Path(root).is_dir():
        raise UserError(f"KDRUN_DATA={root} is not a folder")
    candidates = [Path(root, name)] if root else []
    candidates.append(Path(name).expanduser())
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
        if candidate.is_file():
            raise UserError(f"dataset.name={name}: {candidate} is a file, not a folder")
    if name.startswith(("/", ".", "~")):
        raise UserError(f"dataset.name={name}: there is no such folder")
    return None


def content_of(files: Iterable[Path], root: Path) -> str:
    """Hash of the names and sizes of ``files``: cheap, and equal for copies of the same data."""
    digest = hashlib.sha256()
    for file in files:
        try:
            size = file.stat().st_size
        except OSError as error:  # A link that leads nowhere, or in a circle.
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        digest.update(f"{file.relative_to(root)} {size}\n".encode())
    return digest.hexdigest()


# -- class folders -------------------------------------------------------------------------------


@dataclass
class FolderSource:
    """``<root>/<split>/<class>/<image>``; classes in alphabetical order, as in torchvision."""

    files: list[Path]
    target: Tensor
    class_names: list[str]
    content: str

    def read(self, number: int) -> bytes:
        """The bytes of the file."""
        return self.files[number].read_bytes()

    def where(self, number: int) -> str:
        """The file."""
        return str(self.files[number])


def is_folder_layout(root: Path, split: str) -> bool:
    """Whether ``<root>/<split>/`` holds a folder per class."""
    folder = root / split
    return folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder))


def open_folder(root: Path, split: str) -> FolderSource:
    """The images below ``<root>/<split>``.

    Raises:
        UserError: if there is no such split, or a class without images; names the folder.
    """
    folder = root / split
    if not is_folder_layout(root, split):
        present = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        raise UserError(f"{folder} has no class folders; {root} holds {', '.join(present) or '-'}")
    class_names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    files, counts = [], []
    for name in class_names:
        found = sorted(
            path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not found:
            raise UserError(f"{folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        files += found
        counts.append(len(found))
    target = torch.arange(len(class_names)).repeat_interleave(torch.tensor(counts))
    return FolderSource(files, target, class_names, content_of(files, root))


# -- hub data sets --------------------------------------------------------------------------------


@dataclass
class HubSource:
    """One split of a ``datasets.Dataset`` whose images are left encoded."""

    rows: Any
    image_column: str
    target: Tensor
    class_names: list[str]
    content: str
    label: str

    def read(self, number: int) -> bytes:
        """The bytes stored in the row, or of the file it points at."""
        image = self.rows[number][self.image_column]
        if image is None:
            raise UserError(f"{self.where(number)} holds no image")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def where(self, number: int) -> str:
        """The data set, split and row."""
        return f"{self.label}, row {number}"


def open_hub(
    name: str,
    split: str,
    *,
    folder: Path | None,
    image_column: str,
    label_column: str,
    configuration: str | None = None,
    revision: str | None = None,
) -> HubSource:
    """One split of a hub data set, or of a local folder with the same layout.

    Args:
        name: on the hub.
        split: as the data set calls it.
        folder: the local copy; None asks the hub.
        image_column: column of the images.
        label_column: column of the classes, numbers or text.
        configuration: of data sets that have several.
        revision: commit or tag on the hub.

    Raises:
        UserError: one line: not found, unreadable (naming the file), no such split or column.
    """
    import datasets

    columns = {"image_column": image_column, "label_column": label_column}
    rows = open_split(name, split, columns, folder, configuration, revision)
    if not isinstance(rows.features[image_column], datasets.Image):
        raise UserError(f"{folder or name}: the column {image_column!r} does not hold images")
    rows = rows.select_columns([image_column, label_column])
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    label = f"{folder or name}, {split}"
    target, class_names = classes_of(rows, label_column, label)
    content = f"{split} {content_of(data_files(folder), folder) if folder else _stored_as(rows)}"
    return HubSource(rows, image_column, target, class_names, content, label)


def _stored_as(rows: Any) -> str:
    """Configuration, version and commit of a hub data set, as its local copy is named."""
    return " ".join("/".join(Path(file["filename"]).parts[-4:]) for file in rows.cache_files)


def open_split(
    name: str,
    split: str,
    columns: Mapping[str, str],
    folder: Path | None,
    configuration: str | None = None,
    revision: str | None = None,
) -> Any:
    """The rows of one split of a hub data set, or of a local folder with the same layout.

    Args:
        name: on the hub.
        split: as the data set calls it.
        columns: those that must be there, by the option that names each.
        folder: the local copy; None asks the hub.
        configuration: of data sets that have several.
        revision: commit or tag on the hub.

    Raises:
        UserError: one line: not found, unreadable (naming the file), no such split or column.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(
            str(folder or name), configuration, revision=None if folder else revision
        )
    except Exception as error:
        # Besides the library's own errors, whatever its readers meet in damaged files.
        raise UserError(_why_not_loaded(name, folder, error)) from error
    if split not in loaded:
        raise UserError(f"{folder or name} has no split {split!r}; it has {', '.join(loaded)}")
    rows = loaded[split]
    for option, column in columns.items():
        if column not in rows.column_names:
            present = ", ".join(rows.column_names)
            raise UserError(
                f"{folder or name} has no column {column!r} (dataset.{option}); it has {present}"
            )
    return rows


def classes_of(rows: Any, column: str, label: str) -> tuple[Tensor, list[str]]:
    """Class ids and names from a column of class labels, numbers or text."""
    try:
        values, feature = rows[column][:], rows.features[column]
    except Exception as error:
        raise UserError(f"cannot read {column!r} of {label}: {_line(error)}") from error
    if not values:
        raise UserError(f"{label} is empty")
    if any(value is None or value in (-1, "") or value != value for value in values):
        raise UserError(f"{label}: {column!r} has rows without a class")
    if isinstance(values[0], (list, dict)):
        raise UserError(f"{label}: {column!r} holds more than one value in a row; it is no class")
    names = getattr(feature, "names", None)
    if names is not None:
        return torch.tensor(values, dtype=torch.int64), list(names)
    known = sorted(set(values))
    number = {value: position for position, value in enumerate(known)}
    target = torch.tensor([number[value] for value in values], dtype=torch.int64)
    return target, [str(value) for value in known]


def data_files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, in a fixed order."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.parts[-2:])
    )


def _why_not_loaded(name: str, folder: Path | None, error: Exception) -> str:
    reason = _line(error)
    if folder is None:
        root = os.environ.get("KDRUN_DATA")
        local = f"not below KDRUN_DATA={root}" if root else "not local (KDRUN_DATA is not set)"
        return f"dataset.name={name}: {local}, and the hub says: {reason}"
    culprit = _unreadable_parquet(folder)
    return f"cannot read {culprit}" if culprit else f"cannot read {folder}: {reason}"


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _unreadable_parquet(folder: Path) -> str | None:
    """The first parquet file that cannot be read, and why; the loader itself does not tell."""
    import pyarrow
    from pyarrow import parquet

    for file in sorted(folder.rglob("*.parquet")):
        try:
            parquet.read_table(file)
        except (OSError, pyarrow.ArrowException) as error:
            return f"{file}: {str(error).splitlines()[0]}"
    return None
