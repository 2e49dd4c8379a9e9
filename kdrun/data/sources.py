"""Encoded images with their classes: a hub data set, or the same layout on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kdrun.errors import UserError


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
    try:
        candidates.append(Path(name).expanduser())
    except RuntimeError as error:  # ``~user`` of nobody.
        raise UserError(f"dataset.name={name}: there is no such user") from error
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
        if candidate.is_file():
            raise UserError(f"dataset.name={name}: {candidate} is a file, not a folder")
    if name.startswith(("/", ".", "~")):
        raise UserError(f"dataset.name={name}: there is no such folder")
    return None


def content_of(files: Iterable[os.PathLike[str]], root: Path) -> str:
    """Hash of the names and sizes of ``files``: cheap, and equal for copies of the same data."""
    digest, above = hashlib.sha256(), os.path.join(root, "")
    for file in files:
        name = os.fspath(file).removeprefix(above)
        digest.update(os.fsencode(f"{name} {stat_of(file).st_size}\n"))
    return digest.hexdigest()


def stat_of(file: os.PathLike[str]) -> os.stat_result:
    """Size and times of a file; those of a directory entry are asked for once.

    Raises:
        UserError: for a link that leads nowhere, or in a circle.
    """
    try:
        return file.stat() if isinstance(file, os.DirEntry) else os.stat(file)
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(file)}: {error.strerror}") from error


def data_files(
    folder: os.PathLike[str], above: frozenset[str] = frozenset()
) -> Iterator[os.DirEntry[str]]:
    """All files below a folder in a fixed order, hidden ones left out; links are followed.

    Args:
        folder: where to begin.
        above: the folders that hold it, as far as the search has come.

    Raises:
        UserError: if a folder cannot be read, or a link leads back to a folder that holds it.
    """
    try:
        here = os.path.realpath(folder)
        if here in above:
            raise UserError(f"{os.fspath(folder)} is a link back to {here}, which holds it")
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        folders = {entry.name for entry in entries if entry.is_dir()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.name in folders:
            yield from data_files(entry, above | {here})
        else:
            yield entry


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
    tables: list[Path]

    def read(self, number: int) -> bytes:
        """The bytes stored in the row, or of the file it points at."""
        image = self.rows[number][self.image_column]
        if isinstance(image, bytes):
            return image
        if image is None or (image["bytes"] is None and image.get("path") is None):
            raise UserError(f"{self.where(number)} holds no image")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def where(self, number: int) -> str:
        """The file and its row; of a set from the hub, the data set, split and row."""
        from pyarrow import parquet

        sizes = [parquet.read_metadata(table).num_rows for table in self.tables]
        if sum(sizes) == len(self.rows):
            for table, size in zip(self.tables, sizes, strict=True):
                if number < size:
                    return f"{table}, row {number}"
                number -= size
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
        image_column: column of the images, which may be plain bytes.
        label_column: column of the classes, numbers or text.
        configuration: of data sets that have several.
        revision: commit or tag on the hub.

    Raises:
        UserError: one line: not found, unreadable (naming the file), no such split or column.
    """
    import datasets

    columns = {"image_column": image_column, "label_column": label_column}
    rows = open_split(name, split, columns, folder, configuration, revision)
    if not _holds_images(rows.features[image_column]):
        raise UserError(f"{folder or name}: the column {image_column!r} does not hold images")
    rows = rows.select_columns([image_column, label_column])
    if isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    label = f"{folder or name}, {split}"
    target, class_names = classes_of(rows, label_column, label)
    content = f"{split} {content_of(data_files(folder), folder) if folder else _stored_as(rows)}"
    tables = tables_of(folder, split) if folder else []
    return HubSource(rows, image_column, target, class_names, content, label, tables)


def _holds_images(feature: Any) -> bool:
    """Whether a column is one of images, of encoded bytes, or of records with such ``bytes``.

    The latter two are what other writers of parquet leave.
    """
    import datasets

    if isinstance(feature, dict):
        feature = feature.get("bytes")
    is_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or is_bytes


def tables_of(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, ``<split>-*.parquet``, ``<split>.parquet`` or
    ``<split>/*.parquet``, in the order of their rows.

    Raises:
        UserError: if one of ``<split>-00000-of-00003.parquet`` and so on is not there.
    """
    tables, missing = [], {}
    for file in map(Path, data_files(folder)):
        if file.suffix != ".parquet":
            continue
        if file.parent.name == split or re.split("[-.]", file.name)[0] == split:
            tables.append(file)
        numbered = re.match(r"(.+)-(\d{5})-of-(\d{5})", file.name)
        if numbered and numbered[1] == split:
            among = (file.parent, int(numbered[3]))
            missing.setdefault(among, set(range(among[1]))).discard(int(numbered[2]))
    for (parent, count), numbers in missing.items():
        if numbers:
            name = f"{split}-{min(numbers):05d}-of-{count:05d}.parquet"
            raise UserError(f"{parent} lacks {name}")
    return tables


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

    if folder and configuration is None:
        tables_of(folder, split)
    try:
        with _one_line_only() if folder else contextlib.nullcontext():
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


@contextlib.contextmanager
def _one_line_only() -> Iterator[None]:
    """Keep the datasets library from reporting what we report: by a line that names the file."""
    from datasets.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _why_not_loaded(name: str, folder: Path | None, error: Exception) -> str:
    import yaml

    reason = _line(error)
    if folder is None:
        root = os.environ.get("KDRUN_DATA")
        local = f"not below KDRUN_DATA={root}" if root else "not local (KDRUN_DATA is not set)"
        return f"dataset.name={name}: {local}, and the hub says: {reason}"
    if isinstance(error, yaml.YAMLError):
        return f"cannot read {folder / 'README.md'}: {' '.join(str(error).split())}"
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
