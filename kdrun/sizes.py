"""Numbers of bytes as people read them."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_words(count: float) -> str:
    """Bytes as ``812 B``, ``12.3 MiB`` or ``2.0 TiB``."""
    power = 0
    while count >= 1024 and power < len(UNITS) - 1:
        count /= 1024
        power += 1
    return f"{count:.{min(power, 1)}f} {UNITS[power]}"
