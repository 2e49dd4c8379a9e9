"""Names in messages: the one that was meant, and those there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that ``name`` was most likely meant to be, if any is near."""
    candidates = list(candidates)
    lower = {candidate.lower(): candidate for candidate in reversed(candidates)}
    if name.lower() in lower:
        return lower[name.lower()]
    found = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    return lower[found[0]] if found else None


def listing(names: Iterable[str], limit: int = 12, more: str = "") -> str:
    """Names for the end of an error line, capped: ``a, b, c and 9 more``."""
    names = list(names)
    text = ", ".join(names[:limit])
    if len(names) <= limit:
        return text
    return f"{text} and {len(names) - limit} more{f': {more}' if more else ''}"
