"""The tables that ship inside scikit-learn, read without importing it (which takes 1.5 s)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from kdrun.errors import UserError


def bundled_table(name: str, *, header_lines: int = 0) -> tuple[np.ndarray, list[str]]:
    """One comma-separated table of ``sklearn/datasets/data``.

    Args:
        name: the file, ``.csv`` or ``.csv.gz``.
        header_lines: lines at the top that are not numbers.

    Returns:
        The numbers ``(N, columns)`` in float64, and the fields of the first line if it is a header.

    Raises:
        UserError: if scikit-learn is not installed or does not bring the table.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise UserError("this data set ships inside scikit-learn: pip install scikit-learn")
    path = Path(package.submodule_search_locations[0], "datasets", "data", name)
    if not path.is_file():
        raise UserError(f"this version of scikit-learn has no {path}")
    table = np.loadtxt(path, delimiter=",", skiprows=header_lines, ndmin=2)
    if not header_lines:
        return table, []
    with path.open(encoding="utf-8") as file:
        return table, file.readline().strip().split(",")
