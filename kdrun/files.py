"""Files that are written whole or not at all; no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kdrun.errors import UserError
from kdrun.redaction import redact


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # On a file system that became read-only even removing what is not there fails.
        if temporary.exists():
            temporary.unlink()


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` in one step (``atomic_file``); text without secrets."""
    with atomic_file(path) as file:
        file.write(redact(data).encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, indented for people."""
    write_atomically(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON document; a damaged one is a ``UserError`` that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and run again") from error
