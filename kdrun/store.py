"""Artefacts on disk: named by what they depend on, made once, shared by every run that needs them.

Layout of one artefact::

    <root>/<kind>/<fingerprint>/            what the producer wrote
    <root>/<kind>/<fingerprint>/artefact.json    written last: the artefact is complete
    <root>/<kind>/.<fingerprint>.lock       held by the process that makes it (kdrun/locks.py)

The lock belongs to the operating system and dies with its process, so a killed run never blocks the
next one, which continues from whatever state the producer left in the directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun import distributed
from kdrun.artefacts import MARKER, commit, is_complete
from kdrun.errors import UserError
from kdrun.identity import fingerprint
from kdrun.locks import Lock

WAIT_SECONDS = 0.5
"""Between two looks at whether waiting for another process has become pointless."""


@dataclass(frozen=True)
class Artefact:
    """A finished product of a stage."""

    directory: Path
    key: dict[str, Any]

    @property
    def name(self) -> str:
        """Kind and fingerprint: ``teacher/0123456789abcdef``."""
        return f"{self.directory.parent.name}/{self.directory.name}"

    def path(self, name: str) -> Path:
        """A file of the artefact."""
        return self.directory / name


class Store:
    """The artefacts below one directory.

    Args:
        root: where they live; made on first use.
        say: called with a line for the user (``waiting for ...``).
        while_waiting: called again and again while another process makes what is wanted; may raise
            to give up.
    """

    def __init__(
        self,
        root: Path,
        say: Callable[[str], None] = print,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.root = root
        self.say = say
        self.while_waiting = while_waiting

    def obtain(
        self,
        kind: str,
        key: Mapping[str, Any],
        produce: Callable[[Path], None],
    ) -> tuple[Artefact, bool]:
        """The artefact named by ``key``: an existing one, or what ``produce(directory)`` makes.

        Where several processes want the same one, one makes it and the others wait. All ranks of a
        distributed run take the same branch; only rank 0 locks and commits.

        Returns:
            The artefact, and whether it was there already.
        """
        directory = self.root / kind / fingerprint(key)
        artefact, found = make_once(
            directory, key, produce, self.say, self.while_waiting, what=kind
        )
        if found and distributed.rank() == 0:
            note_use(directory)
        return artefact, found


def make_once(
    directory: Path,
    key: Mapping[str, Any],
    produce: Callable[[Path], None],
    say: Callable[[str], None] = print,
    while_waiting: Callable[[], None] = lambda: None,
    what: str = "run",
    afresh: bool = False,
) -> tuple[Artefact, bool]:
    """Fill ``directory`` by ``produce`` under a lock unless it is complete; see ``Store.obtain``.

    Args:
        directory: the artefact's directory.
        key: what the artefact depends on; kept in its marker.
        produce: writes the files; finds an interrupted attempt's files in place.
        say: called with a line for the user.
        while_waiting: see ``Store``.
        what: what to call the artefact in messages.
        afresh: throw away what is there, finished or not.
    """
    artefact = Artefact(directory, dict(key))
    main = distributed.rank() == 0
    lock = _acquire(directory, what, say, while_waiting)
    try:
        if main and afresh and directory.exists():
            shutil.rmtree(directory)
        if distributed.broadcast(main and is_complete(directory, contents=True)):
            return artefact, True
        if main:
            _make_directory(directory)
            for unfinished in directory.glob(".*.tmp"):
                unfinished.unlink()  # Left by a process that was killed while it wrote.
        distributed.barrier()
        produce(directory)
        if main:
            commit(directory, key)
        distributed.barrier()
        return artefact, False
    finally:
        if lock is not None:
            lock.release()


def note_use(directory: Path) -> None:
    """Remember that an artefact was used now; ``kdrun store gc --budget`` keeps the latest."""
    with contextlib.suppress(OSError):  # A store that others may only read has no memory.
        os.utime(directory / MARKER)


def _acquire(
    directory: Path, what: str, say: Callable[[str], None], while_waiting: Callable[[], None]
) -> Lock | None:
    """Wait for the lock, which rank 0 gets; the others get None.

    All ranks hear of every look, since a process group gives up on one that is silent for long.
    """
    lock = None
    if distributed.rank() == 0:
        _make_directory(directory.parent)
        lock = Lock(directory.with_name(f".{directory.name}.lock"))
    waiting = False
    while not distributed.broadcast(
        lock is not None and lock.acquire(timeout=WAIT_SECONDS if waiting else 0)
    ):
        if lock is None:
            continue
        if not waiting:
            who = lock.told()
            say(
                f"waiting for another run that works on this {what} ({directory})"
                + (f": {who}" if who else "")
            )
        waiting = True
        while_waiting()
    return lock


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {directory}: {error.strerror or error}") from error
