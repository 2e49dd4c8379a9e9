"""Finished products on disk: a directory whose marker lists every file with size and checksum.

No torch, so that the store can be looked after at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrun.errors import UserError
from kdrun.files import file_sha256, read_json, write_json

MARKER = "artefact.json"
RESULT = "result.json"
"""What a finished run has come to, in its directory."""
RESULT_SCHEMA = 1
"""Which entries it has: another number, other entries."""
LOGS = ("log.txt", "logs")
"""What may be moved or thrown away without harm to a finished artefact."""


def commit(directory: Path, key: Mapping[str, Any]) -> None:
    """Mark the artefact complete, with the size and checksum of each of its files but ``LOGS``."""
    files = {
        str(path.relative_to(directory)): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.relative_to(directory).parts[0] not in (MARKER, *LOGS)
        and not path.name.startswith(".")
    }
    write_json(directory / MARKER, {"key": dict(key), "finished": time.time(), "files": files})


def read_marker(directory: Path) -> dict[str, Any]:
    """What the marker of a finished artefact says: its ``key`` and its ``files``.

    Raises:
        UserError: the marker is damaged.
    """
    path = directory / MARKER
    marker = read_json(path)
    match marker:
        case {"key": dict(), "files": dict(files)} if all(map(_has_facts, files.values())):
            return marker
    raise UserError(f"{path} is damaged (it lists no files); remove it and run again")


def _has_facts(entry: Any) -> bool:
    return isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


def is_complete(directory: Path, contents: bool = False, names: Sequence[str] = ()) -> bool:
    """Whether the artefact was finished and its files are still what was written.

    Args:
        directory: of the artefact.
        contents: compare checksums too, not only sizes.
        names: of the files that matter; none: all of them.

    Raises:
        UserError: it was finished, but is damaged.
    """
    if not (directory / MARKER).is_file():
        return False
    for path in damaged(directory, contents, names):
        raise UserError(
            f"{path} is missing or not what was written; remove {directory} to make it again"
        )
    return True


def damaged(directory: Path, contents: bool = True, names: Sequence[str] = ()) -> Iterator[Path]:
    """Files of a finished artefact that are missing or are not what was written."""
    written = read_marker(directory)["files"]
    for name in names or written:
        path, facts = directory / name, written.get(name)
        if (
            facts is None
            or not path.is_file()
            or path.stat().st_size != facts["bytes"]
            or contents
            and file_sha256(path) != facts["sha256"]
        ):
            yield path
