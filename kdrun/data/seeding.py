"""Random streams named by numbers, so that any draw can be made again without history."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def stream_seed(*words: int) -> int:
    """One well mixed 64-bit seed of several integers (the finaliser of SplitMix64, chained).

    Neighbouring words such as consecutive epochs give unrelated seeds, which matters because the
    generator on the CPU looks only at the low 32 bits.
    """
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def stream(*words: int) -> torch.Generator:
    """A CPU generator at the start of the stream that ``words`` name, e.g. seed, epoch, purpose.

    Always on the CPU: the numbers are then the same whatever device uses them.
    """
    return torch.Generator().manual_seed(stream_seed(*words))
