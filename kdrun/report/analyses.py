"""Statistics of a table's results as text: against the baseline, and of one metric with others."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdrun.errors import UserError
from kdrun.report.alignment import aligned
from kdrun.report.results import Entry, Results
from kdrun.report.statistics import Test, bootstrap, correlation, holm, paired


def paired_text(results: Results, corrected: bool = False) -> str:
    """Every cell against the baseline of its column, over the seeds that both have.

    Mean difference with its bootstrap interval (BCa, 95%), Student's t-test and Wilcoxon's
    signed-rank test.

    Args:
        results: the table.
        corrected: show p-values after Holm's correction over all cells, each test by itself.

    Raises:
        UserError: no cell shares two seeds with its baseline.
    """
    pairs = list(_pairs(results))
    if not pairs:
        raise UserError("no row shares two seeds with its baseline: there is nothing to compare")
    tests = {
        kind: [paired(entry.values, other.values, kind) for entry, other in pairs]
        for kind in ("t", "wilcoxon")
    }
    p_values = {kind: [test.p_value for test in found] for kind, found in tests.items()}
    if corrected:
        p_values = {kind: holm(found) for kind, found in p_values.items()}
    blocks = []
    for column in results.columns:
        rows = [["", "against", "n", "difference", "95% interval", "p (t)", "p (Wilcoxon)"]]
        for number, (entry, other) in enumerate(pairs):
            if entry.column != column:
                continue
            seeds = sorted(entry.values.keys() & other.values.keys())
            found = bootstrap([entry.values[seed] - other.values[seed] for seed in seeds])
            rows.append(
                [
                    entry.row,
                    other.row,
                    str(found.n),
                    f"{found.estimate:+.4f}",
                    _interval(found),
                    *(_p(p_values[kind][number]) for kind in ("t", "wilcoxon")),
                ]
            )
        if len(rows) > 1:
            blocks.append(f"{column}\n{aligned(rows, left=2)}")
    note = "two-sided" + (", after Holm's correction" if corrected else ", not corrected")
    closing = (
        f"p: {note}; ?: cannot be decided. Interval: bootstrap over seeds (BCa), too narrow where "
        "they are few"
    )
    return "\n\n".join([*blocks, closing])


def correlation_text(results: Results) -> str:
    """Correlation of the metric with every other test metric over all distilled runs of a column.

    Spearman's and Pearson's, with 95% intervals.

    Raises:
        UserError: no column has three runs.
    """
    blocks = []
    for column in results.columns:
        entries = [results.cells[row, column] for row in results.rows]
        distilled = [entry for entry in entries if entry.network == "distilled"]
        points = _points(distilled, results.epoch)
        metric = distilled[0].metric if distilled else ""
        others = [name for name in points if name != metric]
        rows = [[f"{metric} and", "n", "Spearman", "95% interval", "p", "Pearson", "interval", "p"]]
        for name in others:
            both = zip(points[metric], points[name], strict=True)
            known = [(x, y) for x, y in both if math.isfinite(x) and math.isfinite(y)]
            x, y = [x for x, _ in known], [y for _, y in known]
            spearman, pearson = correlation(x, y), correlation(x, y, "pearson")
            if spearman.p_value is not None:
                rows.append([name, str(spearman.n), *_told(spearman), *_told(pearson)])
        if len(rows) > 1:
            blocks.append(f"{column}\n{aligned(rows)}")
    if not blocks:
        raise UserError("no column has three runs with different results")
    return "\n\n".join([*blocks, "over all distilled runs of a column, every seed a point"])


def _pairs(results: Results) -> list[tuple[Entry, Entry]]:
    """Cells with the baseline of their column, where both have two seeds in common."""
    found = []
    for entry in results.entries:
        other = results.cells.get((entry.baseline, entry.column))
        if other is None or other.row == entry.row or other.metric != entry.metric:
            continue
        if len(entry.values.keys() & other.values.keys()) > 1:
            found.append((entry, other))
    return found


def _points(entries: Sequence[Entry], epoch: str) -> dict[str, list[float]]:
    """Every test metric that all runs have, run by run."""
    of_runs = [
        found
        for entry in entries
        for run in entry.runs
        if (found := run.results(entry.network, epoch)) is not None
    ]
    if not of_runs:
        return {}
    names = [name for name in of_runs[0] if all(name in values for values in of_runs)]
    return {name: [float(values[name]) for values in of_runs] for name in names}


def _told(test: Test) -> list[str]:
    return [f"{test.estimate:+.3f}", _interval(test, 2), _p(test.p_value)]


def _interval(test: Test, places: int = 4) -> str:
    if test.low is None or test.high is None:
        return ""
    return f"{test.low:+.{places}f} to {test.high:+.{places}f}"


def _p(p_value: float | None) -> str:
    if p_value is None:
        return "?"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
