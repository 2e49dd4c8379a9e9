"""The table of specialised teachers that a run of MST-Distill closes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdrun.report.alignment import aligned

COLUMNS = ("", "layer", "KL plain", "KL masked", "mask std", "routed first", "routed last")
VALUES = ("plain_kl", "kl", "spread")
"""The entries of ``result.json`` in the columns of numbers."""


def specialists_table(specialists: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each teacher that phase 3 routes to, as aligned text.

    Args:
        specialists: by name, as in ``result.json``.
    """
    rows = [list(COLUMNS)]
    for name, entry in specialists.items():
        numbers = [f"{entry[what]:.3f}" if what in entry else "" for what in VALUES]
        shares = [f"{100 * entry['share'][epoch]:.1f}%" for epoch in ("first", "last")]
        rows.append([name, entry.get("layer", ""), *numbers, *shares])
    note = (
        "(KL to the student on validation, without and with the mask; standard deviation of the "
        "mask over channels; share of samples routed there in the first and last epoch)"
    )
    return f"{aligned(rows, left=2)}\n{note}"
