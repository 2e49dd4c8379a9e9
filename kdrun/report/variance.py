"""Where the variation of results comes from: rows, columns, or chance."""

from __future__ import annotations

import math

from kdrun.errors import UserError
from kdrun.report.alignment import aligned
from kdrun.report.results import Results
from kdrun.report.statistics import factorial_anova


def text(results: Results) -> str:
    """Analysis of variance of all distilled runs by row and column, for each metric.

    Raises:
        UserError: too few runs, or statsmodels is not installed.
    """
    blocks = []
    for metric in dict.fromkeys(entry.metric for entry in results.entries):
        entries = [
            entry
            for entry in results.entries
            if entry.metric == metric and entry.network == "distilled"
        ]
        known = [
            (value, entry)
            for entry in entries
            for value in entry.values.values()
            if math.isfinite(value)
        ]
        values = [value for value, _ in known]
        factors = {
            "row": [entry.row for _, entry in known],
            "column": [entry.column for _, entry in known],
        }
        rows = [["", "share of variance", "F", "p"]]
        for name, test in factorial_anova(values, factors).items():
            if test.statistic is None:
                continue
            p_value = f"{test.p_value:.4f}" if test.p_value >= 0.0001 else "<0.0001"
            rows.append([name, f"{100 * test.estimate:.1f}%", f"{test.statistic:.2f}", p_value])
        if len(rows) > 1:
            blocks.append(f"{metric} of {len(values)} runs\n{aligned(rows)}")
    if not blocks:
        raise UserError("too few runs for an analysis of variance: more seeds, rows or columns")
    notes = "two factors without interaction, type II sums of squares; what is left is chance"
    return "\n\n".join([*blocks, notes])
