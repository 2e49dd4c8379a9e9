"""Durations as people read them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Seconds as ``42 s``, ``3:05`` or ``2:03:05``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
