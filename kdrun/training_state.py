"""The state of an unfinished training on disk: whole, checked, and never the only copy.

``last.ckpt`` is a plain PyTorch file. Its checksum is the comment of the zip archive that such a
file is, so both are written, renamed and lost together. The checkpoint before it stays beside it as
``previous.ckpt`` until training ends (with ``trainer.keep_last`` above 2 also older ones, as
``previous.2.ckpt`` and so on); going on from one of those gives the same result, some steps later.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kdrun import distributed
from kdrun.errors import UserError
from kdrun.files import atomic_file

CHECKPOINT, PREVIOUS = "last.ckpt", "previous.ckpt"
_WORD = b"sha256:"
_COMMENT = len(_WORD) + hashlib.sha256().digest_size * 2
_NO_COMMENT = bytes(2)
"""How an archive without a comment ends: the comment's length."""


def write_checkpoint(path: Path, state: dict[str, Any], keep: int = 2) -> None:
    """Write a state with its checksum; the checkpoint that was at ``path`` becomes the previous.

    Args:
        path: of the newest.
        state: plain values and tensors.
        keep: checkpoints to keep, the new one among them.

    Raises:
        UserError: it cannot be written; the one that was there stays as it was.
    """
    with atomic_file(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(state, hashing)
        except RuntimeError as error:
            # The writer of the archive complains of a position and hides why it could not write.
            raise hashing.failure or error from None
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_COMMENT.to_bytes(2, "little") + _WORD + hashing.digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
        # Not before the new one is on the disk.
        _make_room(path, keep)


def previous_checkpoints(path: Path) -> list[Path]:
    """The checkpoints beside the newest one at ``path``, the latest of them first."""
    older = path.parent.glob("previous.*.ckpt")
    numbered = sorted(older, key=lambda place: int(place.name.split(".")[1]))
    first = path.with_name(PREVIOUS)
    return [first, *numbered] if first.exists() else numbered


def _make_room(path: Path, keep: int) -> None:
    places = [path, path.with_name(PREVIOUS)]
    places += [path.with_name(f"previous.{number}.ckpt") for number in range(2, keep)]
    for excess in set(previous_checkpoints(path)) - set(places[1:keep]):
        excess.unlink()
    for place, older in reversed(list(zip(places[: keep - 1], places[1:keep], strict=True))):
        if place.exists():
            os.replace(place, older)


def read_checkpoint(
    path: Path, key: str, say: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """The newest sound training state, or None where there is none.

    Args:
        path: of the newest; the previous one lies beside it.
        key: names what is trained.
        say: told when the newest is damaged and the previous one is used.

    Raises:
        UserError: no checkpoint there is can be read, or it belongs to another configuration.
    """
    damage = ""
    for candidate in (path, *previous_checkpoints(path)):
        if not candidate.exists():
            continue
        try:
            state = _read(candidate)
        except _Damaged as error:
            damage = damage or str(error)
            continue
        if state["key"] != key:
            raise UserError(
                f"{candidate} belongs to another configuration; remove it to start again"
            )
        if damage:
            say(f"{path} is damaged ({damage}): going on from {candidate.name} beside it")
        return state
    if damage:
        raise UserError(
            f"cannot read the checkpoint {path} ({damage}); remove it to start this training again"
        )
    return None


def generator_states() -> dict[str, Any]:
    """States of the global random generators of this process."""
    version, words, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_generators(states: list[dict[str, Any]]) -> None:
    """Put this rank's generators back; ``states`` are those of all ranks."""
    state = states[min(distributed.rank(), len(states) - 1)]
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


class _Hashing:
    """A file to write whose content is hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _read(path: Path) -> dict[str, Any]:
    _verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise _Damaged(reason) from error


def _verify(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - _COMMENT - len(_NO_COMMENT)
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        comment = file.read()[len(_NO_COMMENT) :]
    digest.update(_NO_COMMENT)
    if not comment.startswith(_WORD):
        raise _Damaged("it ends without a checksum: torn, or not written by kdrun")
    if comment != _WORD + digest.hexdigest().encode():
        raise _Damaged("its checksum differs")
