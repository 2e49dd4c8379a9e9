"""Locks between processes, with a note of who holds each; no torch.

A lock belongs to the operating system (``flock``) and dies with its process. On a network file
system it is the file server's: all machines respect it, but a machine that goes down may leave it
behind until the server notices. So the holder leaves a note beside the lock, and whoever waits is
told whom for, and what to do where nobody is at work any more.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kdrun.errors import UserError
from kdrun.files import write_json


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: name of the machine.
        pid: number of the process there.
        since: when it took the lock, seconds since 1970.
    """

    host: str
    pid: int
    since: float

    @classmethod
    def here(cls) -> Holder:
        """This process, now."""
        return cls(socket.gethostname(), os.getpid(), time.time())

    @property
    def is_gone(self) -> bool:
        """Whether it is a process of this machine that has ended."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False  # Of another user.
        return False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"


class Lock:
    """One file's lock, held by at most one process.

    Args:
        path: of the lock file; its directory must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._note = path.with_name(f"{path.name}.holder")
        self._lock = FileLock(path)

    def acquire(self, timeout: float = 0) -> bool:
        """Take the lock, waiting up to ``timeout`` seconds; returns whether that succeeded.

        Raises:
            UserError: the file system has no locks, or the file cannot be written.
        """
        if not self._take(timeout):
            return False
        try:
            for unfinished in self.path.parent.glob(f".{self._note.name}.*.tmp"):
                unfinished.unlink()  # Left by a holder that was killed while it wrote.
            write_json(self._note, asdict(Holder.here()))
        except UserError:
            self._lock.release()
            raise
        return True

    def is_held(self) -> bool:
        """Whether some process holds the lock now."""
        if not self._take():
            return True
        self._lock.release()
        return False

    def _take(self, timeout: float = 0) -> bool:
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot lock {self.path}: {reason}") from error
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._note.unlink(missing_ok=True)
        self._lock.release()

    def holder(self) -> Holder | None:
        """Who says that it holds the lock; None where nobody does, or the note is not readable."""
        try:
            return Holder(**json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # Only what is said depends on it.

    def told(self) -> str:
        """The holder in words, and what to do if it is no more; empty where there is none."""
        holder = self.holder()
        if holder is None:
            return ""
        if holder.is_gone:
            return (
                f"{holder}, which has ended: a process that it started may still hold the lock; "
                f"if none does, remove {self.path}"
            )
        if holder.host != socket.gethostname():
            return f"{holder}; if that machine is down, remove {self.path}"
        return str(holder)
