"""Files that are written whole or not at all; no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kdrun.errors import UserError
from kdrun.redaction import redact


def typed_path(text: str | Path) -> Path:
    """A path as a user writes it, ``~`` resolved.

    Raises:
        UserError: it is none: an empty character in it, or a ``~name`` that nobody has.
    """
    try:
        path = Path(text).expanduser()
        path.exists()  # A name that is too long is an OSError here; the command says so.
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{text!r} is no path: {error}") from error
    return path


def walk(place: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As ``os.walk``, from a place down, by name; folders behind links too, each folder once."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(place, followlinks=True):
        try:
            fact = os.stat(folder)
        except FileNotFoundError:  # Just now removed.
            continue
        if (fact.st_dev, fact.st_ino) in seen:
            folders.clear()
            continue
        seen.add((fact.st_dev, fact.st_ino))
        folders.sort()
        yield Path(folder), folders, files


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` only when all of it is on the disk.

    Readers see the old file or the new one, whole. When writing fails (a full disk), the old one
    stays and the failure is a ``UserError``.
    """
    # Processes of several machines, or containers, may have the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # On a file system that became read-only even removing what is not there fails.
        if temporary.exists():
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a renaming last through a loss of power, where the file system can."""
    place = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # The file itself is whole in any case.
            os.fsync(place)
    finally:
        os.close(place)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` in one step (``atomic_file``); text without secrets."""
    with atomic_file(path) as file:
        file.write(redact(data).encode() if isinstance(data, str) else data)


NOT_FINITE = "not_finite"
"""Entry of a JSON document that names its values that JSON has no word for: NaN and infinity."""


def json_text(document: Any) -> str:
    """A value as JSON that any reader takes, indented for people.

    A number that is not finite is null; what it was stands under ``not_finite`` at the top of the
    document, by its dotted place: ``{"kl": null, "not_finite": {"kl": "nan"}}``.
    """
    found: dict[str, str] = {}
    plain = _finite(document, "", found)
    if found:
        plain = {**plain, NOT_FINITE: found} if isinstance(plain, dict) else plain
    return json.dumps(plain, indent=2, default=str, allow_nan=False) + "\n"


def parse_json(text: str | bytes) -> Any:
    """The inverse of ``json_text``: numbers that are not finite are floats again.

    Raises:
        ValueError: the text is no JSON, or no UTF-8.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or NOT_FINITE not in document:
        return document
    found = document.pop(NOT_FINITE)
    return _restored(document, "", found)


def _finite(value: Any, place: str, found: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found[place] = repr(value)
        return None
    if isinstance(value, dict):
        return {str(k): _finite(item, _below(place, k), found) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, _below(place, i), found) for i, item in enumerate(value)]
    return value


def _restored(value: Any, place: str, found: dict[str, str]) -> Any:
    if value is None and place in found:
        return float(found[place])
    if isinstance(value, dict):
        return {k: _restored(item, _below(place, k), found) for k, item in value.items()}
    if isinstance(value, list):
        return [_restored(item, _below(place, i), found) for i, item in enumerate(value)]
    return value


def _below(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document (``json_text``) atomically."""
    write_atomically(path, json_text(value))


def read_json(path: Path) -> Any:
    """Read a JSON document (``parse_json``); a damaged one is a ``UserError`` that names it."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it and run again") from error
