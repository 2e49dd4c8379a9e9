"""The process: settings made once before training, and what memory there is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kdrun.errors import UserError

NO_MEMORY = ("not enough memory", "can't allocate memory")
"""What PyTorch says where the CPU's allocator gets nothing; for a GPU it has an error class."""
REFUSED = "does not have a deterministic implementation"
"""What PyTorch says of a kernel that gives other bits each time."""

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def prepare_process(trainer: Mapping[str, Any]) -> None:
    """Threads, the allocator and denormals, from the ``trainer`` config group.

    Denormal numbers are flushed to zero: on a CPU they slow a step many times over, and no training
    depends on them.
    """
    if trainer["num_threads"] is not None:
        torch.set_num_threads(trainer["num_threads"])
    torch.set_flush_denormal(True)
    if not torch.cuda.is_available():
        keep_freed_memory()


@contextlib.contextmanager
def device_errors_told() -> Iterator[None]:
    """Tell what a device cannot do, and what to change, in one line.

    Raises:
        UserError: its memory is not enough, or it has no kernel that always gives the same bits.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
        if isinstance(error, torch.OutOfMemoryError) or any(words in reason for words in NO_MEMORY):
            raise UserError(
                "the memory of the device is not enough: lower training.batch_size, raise "
                "trainer.accumulate (a batch goes through in so many parts), or set "
                "trainer.precision=bf16"
            ) from error
        if REFUSED in reason:
            raise UserError(
                f"{reason.split()[0]} gives other bits each time on this device: set "
                "trainer.deterministic=false, or choose a network or method that does without it"
            ) from error
        raise


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step; returns whether it did.

    Activations of a CPU step are large enough for glibc to take each from the kernel and give it
    back, which costs page faults at every step. The process holds its peak memory until it ends.
    """
    return _set_allocator(M_MMAP_MAX, 0) and _set_allocator(M_TRIM_THRESHOLD, 2**31 - 1)


def use_one_arena() -> bool:
    """Let all threads take memory from one place; returns whether glibc was told so.

    Runs that go side by side in threads would each keep the memory of their own last step.
    """
    return _set_allocator(M_ARENA_MAX, 1)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or on this machine where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    if facts.is_file():
        for line in facts.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Largest memory in bytes so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _set_allocator(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(option, value))
