"""Decoded images of small sets on disk, memory-mapped, so that the second start is instant."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kdrun.data.decode import check_memory, decode, decode_all, to_array
from kdrun.data.resident import Samples
from kdrun.data.sources import ImageSource
from kdrun.errors import UserError

FORMAT = 2


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/kdrun/images``, by default below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "kdrun", "images")


def decoded(
    key: str,
    open_source: Callable[[], ImageSource],
    *,
    channels: int,
    size: int | None,
    resize: int | None,
    cache: bool,
) -> tuple[Samples, list[str]]:
    """All images of a source in memory, and the class names.

    With ``cache`` they are decoded once and mapped from disk afterwards; the source is then not
    even opened. Two processes may fill the cache at once: each writes a folder of its own and the
    first to finish moves it into place. What cannot be read is thrown away and made again.

    Args:
        key: names everything that decides the content of the source.
        open_source: called where the images have to be decoded.
        channels: 1 or 3.
        size: side of the central square; None keeps images as they are.
        resize: the shorter side before that.
        cache: whether to look into and fill the cache.

    Raises:
        UserError: as ``decode_all`` and ``check_memory``, and if the disk is too full.
    """
    if not cache:
        source = open_source()
        images = np.empty(_shape(source, channels, size, resize), np.uint8)
        decode_all(source, images, size=size, resize=resize)
        return _samples(images, source.target, ""), source.class_names
    words = json.dumps([FORMAT, key, channels, size, resize])
    folder = cache_root() / hashlib.sha256(words.encode()).hexdigest()[:20]
    if folder.is_dir():
        try:
            return _read(folder)
        except (FileNotFoundError, ValueError, KeyError, EOFError) as error:
            print(f"{folder} cannot be read ({error}) and is made again", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    _fill(folder, open_source(), channels, size, resize)
    return _read(folder)


def _read(folder: Path) -> tuple[Samples, list[str]]:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    # Copy-on-write: a writable array for torch whose pages stay shared and whose file stays as is.
    images = np.load(folder / "images.npy", mmap_mode="c")
    target = torch.from_numpy(np.load(folder / "target.npy"))
    return _samples(images, target, about["content"]), about["class_names"]


def _fill(
    folder: Path, source: ImageSource, channels: int, size: int | None, resize: int | None
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shape = _shape(source, channels, size, resize)
    _check_disk(folder.parent, shape)
    print(f"decoding {len(source.target):,} images, once; kept in {folder.parent}", flush=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        images = np.lib.format.open_memmap(scratch / "images.npy", "w+", np.uint8, shape)
        decode_all(source, images, size=size, resize=resize)
        images.flush()
        content = _samples(images, source.target, "").content
        np.save(scratch / "target.npy", source.target.numpy())
        about = {"content": content, "class_names": source.class_names}
        (scratch / "about.json").write_text(json.dumps(about), encoding="utf-8")
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_disk(folder: Path, shape: tuple[int, ...]) -> None:
    """Writing to a mapped file on a full disk would end the process by a signal."""
    needed, free = math.prod(shape), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the decoded images need {needed / 2**30:.1f} GiB and {folder} has "
            f"{free / 2**30:.1f} GiB left: set XDG_CACHE_HOME to a folder on another disk, or "
            "dataset.cache=false"
        )


def _shape(
    source: ImageSource, channels: int, size: int | None, resize: int | None
) -> tuple[int, ...]:
    side = (channels, size, size) if size else to_array(decode(source, 0, channels)).shape
    shape = (len(source.target), *side)
    check_memory(shape)
    return shape


def _samples(images: np.ndarray, target: torch.Tensor, content: str) -> Samples:
    index = torch.arange(target.shape[0])
    return Samples(torch.from_numpy(images), target, index, content)
