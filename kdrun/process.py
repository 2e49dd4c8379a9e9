"""Settings of the whole process, made once before training."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


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


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step; returns whether it did.

    Activations of a CPU step are large enough for glibc to take each from the kernel and give it
    back, which costs page faults at every step. The process holds its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
