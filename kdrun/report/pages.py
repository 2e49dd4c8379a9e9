"""Pages: one self-contained HTML file per table and per run, for the browser and for the archive.

A page needs no network and no server. Its figures are drawings (SVG by matplotlib) that follow the
page into dark mode; its only script sorts and filters, and nothing is missing without it. Drawings
rather than a plotting library in the browser, because a page then weighs some hundred kilobytes
instead of several megabytes, prints, and still opens in ten years.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kdrun.clock import clock
from kdrun.report import drawings, formats
from kdrun.report.details import read_provenance
from kdrun.report.html import Card, Cell, number, places_of, render, sort_key
from kdrun.report.results import NOT_RUN, Entry, Results
from kdrun.report.runs import Run

MOST_RUNS = 500
"""So many runs of a table are listed, and their ``env.json`` read."""


def table_page(results: Results, place: Path) -> str:
    """The page of a table of results.

    Args:
        results: the table.
        place: the directory that the page will lie in, for links to runs.

    Raises:
        UserError: matplotlib is not installed.
    """
    figures = drawings.of_results(results)
    warning = formats.shrunken_results(results)
    runs = list({run.directory: run for e in results.entries for run in e.runs}.values())
    sections = [("Overview", "overview"), ("Details", "details")]
    sections += [(TITLES[name], name) for name, found in figures.items() if found]
    heads, details = without_empty_columns(
        HEADS,
        [_detail(results.cells[row, column]) for column in results.columns for row in results.rows],
    )
    return render(
        "table.html",
        title=results.title,
        description=results.description,
        shrunk=warning,
        notes=[*formats.notes(results)[bool(warning) :], *_not_drawn(results)],
        sections=[*sections, ("Provenance", "provenance")],
        columns=results.columns,
        matrix=[_matrix_line(results, row) for row in results.rows],
        any_published=any(entry.published is not None for entry in results.entries),
        heads=heads,
        details=details,
        drawings=figures,
        curves_note=drawings.CURVES,
        provenance=provenance(runs[:MOST_RUNS]),
        runs=[_link(run, place) for run in runs[:MOST_RUNS]],
        left_out=max(0, len(runs) - MOST_RUNS),
    )


def _not_drawn(results: Results) -> list[str]:
    """What is said where there are more columns than figures show."""
    number, most = len(results.columns), drawings.MOST_COLUMNS
    return [f"figures: of the first {most} of {number} columns"] if number > most else []


HEADS = (
    *("column", "row", "result", "±", "n", "published", "difference"),
    *("p", "p (Holm)", "trained in"),
)
TITLES = {
    "comparison": "Comparison",
    "curves": "Learning curves",
    "calibration": "Calibration",
    "agreement": "Agreement",
    "terms": "Loss terms",
    "sensitivity": "Sensitivity",
}
OF_RUN = {
    "curves": "Training",
    "calibration": "Calibration and agreement",
    "confusion": "Confusion",
}
"""Sections with drawings of a table and of a run, by their anchors."""


def run_page(run: Run) -> str:
    """The page of one run.

    Raises:
        UserError: matplotlib is not installed.
    """
    figures = drawings.of_run(run)
    environment = read_provenance(run)
    names = run.names
    sections = [("Results", "results")]
    sections += [(OF_RUN[name], name) for name, found in figures.items() if found]
    heads, rows = _networks(run)
    return render(
        "run.html",
        title=f"{names['method']}: {names['teacher']} → {names['student']}",
        description=f"{names['dataset']}, seed {run.seed}",
        shrunk=formats.shrunken([run]),
        notes=[formats.PROTOCOLS[run.protocol]],
        cards=_cards(run),
        sections=[*sections, ("Provenance", "provenance")],
        heads=heads,
        rows=rows,
        drawings=figures,
        command=run.command,
        provenance=[("directory", str(run.directory)), *provenance([run])],
        changes=_text(run.directory / "overrides.txt"),
        config=_text(run.directory / "config.yaml"),
        difference=(environment.get("git") or {}).get("diff", ""),
    )


# -- cells -----------------------------------------------------------------------------------------


def _matrix_line(results: Results, row: str) -> dict[str, Any]:
    cells = []
    for column in results.columns:
        entry = results.cells[row, column]
        style = "best" if formats.is_best(entry, results) else ""
        style = style or ("missing" if entry.mean is None else "")
        cells.append(
            {
                "value": formats.value(entry),
                "count": formats.count(entry),
                "published": formats.published(entry),
                "difference": formats.difference(entry),
                "sign": _sign(entry),
                "style": style,
            }
        )
    return {"row": row, "cells": cells}


def _sign(entry: Entry) -> str:
    """Whether a difference from the published number is for the better."""
    if entry.difference is None or not math.isfinite(entry.difference):
        return ""
    if not float(formats.difference(entry)):
        return ""
    return "good" if (entry.difference > 0) == (entry.direction == "max") else "bad"


def _detail(entry: Entry) -> dict[str, Any]:
    places = formats.digits(entry)
    mean = number(entry.mean, places)
    if entry.mean is None:
        mean = Cell("–" if entry.missing == NOT_RUN else entry.missing, style="missing")
    cells = [
        Cell(entry.column, entry.column, "left"),
        Cell(entry.row, entry.row, "left"),
        mean,
        number(entry.std, places),
        Cell(formats.count(entry), entry.n or ""),
        number(entry.published, places),
        Cell(formats.difference(entry), sort_key(entry.difference), _sign(entry)),
        Cell(formats.p_value(entry), sort_key(entry.test.p_value if entry.test else None)),
        number(entry.adjusted, 3),
        Cell(clock(entry.seconds) if entry.seconds else "", sort_key(entry.seconds)),
    ]
    return {
        "cells": cells,
        "column": entry.column,
        "known": entry.mean is not None,
        "reference": entry.network != "distilled",
    }


def without_empty_columns(
    heads: Sequence[str], lines: list[dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns of a table in which something stands."""
    used = [i for i in range(len(heads)) if any(line["cells"][i].text for line in lines)]
    shown = [line | {"cells": [line["cells"][i] for i in used]} for line in lines]
    return [heads[i] for i in used], shown


def _cards(run: Run) -> list[Card]:
    """The last weights of each network in one number, and what distillation has done."""
    values = {role: run.value(role, run.metric, "last") for role in run.networks}
    teacher, alone, distilled = map(values.get, ("teacher", "alone", "distilled"))
    sign = 1.0 if run.direction == "max" else -1.0
    cards = []
    for role, value in values.items():
        size = run.networks[role].get("parameters")
        note = f"{run.names.get(role, run.names['student'])}, {size:,} parameters" if size else ""
        cards.append(Card(LABELS.get(role, role), "" if value is None else f"{value:.2f}", note))
    if distilled is not None and alone is not None:
        note = f"{run.metric}, distilled minus alone"
        if teacher is not None and sign * (teacher - alone) > 0:
            closed = 100 * (distilled - alone) / (teacher - alone)
            if closed >= 0:
                note = f"{closed:.0f}% of the way from the student alone to the teacher"
        cards.append(Card("gained", f"{distilled - alone:+.2f}", note))
    found = run.results("distilled", "last") or {}
    if found.get("agreement") is not None:
        kl = found.get("kl")
        note = "same answer on the test set" + ("" if kl is None else f"; KL {kl:.4f}")
        cards.append(Card("agreement with the teacher", f"{found['agreement']:.1f}%", note))
    return cards


LABELS = {"alone": "student alone"}
"""Roles of networks whose cards have other names."""


def _networks(run: Run) -> tuple[list[str], list[list[Cell]]]:
    """All test results of a run: a line per network and epoch."""
    lines: list[tuple[str, dict[str, Any], dict[str, float]]] = []
    for role, facts in run.networks.items():
        for key in ("test", "test_last", "test_best"):
            if key in facts:
                label = f"{role} {key.removeprefix('test_')}" if key != "test" else role
                lines.append((label, dict(facts), facts[key]))
    metrics = list(dict.fromkeys(name for _, _, values in lines for name in values))
    heads = ["network", "architecture", "parameters", *metrics, "trained in"]
    rows = []
    for label, facts, values in lines:
        seconds = facts.get("training", {}).get("seconds")
        parameters = facts.get("parameters")
        rows.append(
            [
                Cell(label, label),
                Cell(str(facts.get("network", ""))),
                Cell(f"{parameters:,}" if parameters else "", parameters or ""),
                *(number(values.get(name), places_of(values.get(name))) for name in metrics),
                Cell(clock(seconds) if seconds else "", sort_key(seconds)),
            ]
        )
    return heads, rows


# -- provenance ------------------------------------------------------------------------------------


def provenance(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """What the runs were made with, each different value once."""
    found: dict[str, dict[str, None]] = {}

    def note(name: str, value: object) -> None:
        if value:
            found.setdefault(name, {})[str(value)] = None

    seconds = 0.0
    for run in runs:
        environment = read_provenance(run)
        git = environment.get("git") or {}
        changed = " with uncommitted changes" if git.get("diff") else ""
        packages = environment.get("packages", {})
        note("source", f"{git['commit'][:12]}{changed}" if git.get("commit") else "")
        note("versions", " ".join(f"{n} {packages[n]}" for n in SHOWN if n in packages))
        note("python", environment.get("python"))
        note("platform", environment.get("platform"))
        note("processor", environment.get("processor"))
        note("GPUs", ", ".join(environment.get("gpus", [])))
        note("threads", environment.get("threads"))
        note("started", environment.get("time"))
        seconds += run.seconds
    lines = [(name, _listed(values)) for name, values in found.items()]
    return [*lines, ("wall time", clock(seconds))] if seconds else lines


SHOWN = ("kdrun", "torch", "lightning", "numpy")
"""Packages whose versions are shown; all are in each run's ``env.json``."""


def _listed(values: Iterable[str], most: int = 4) -> str:
    values = sorted(values)
    shown = "; ".join(values[:most])
    return shown if len(values) <= most else f"{values[0]} … {values[-1]} ({len(values)} values)"


def _link(run: Run, place: Path) -> dict[str, str]:
    page = run.directory / "report.html"
    label = f"{run.directory.parent.name}/{run.directory.name}"
    link = quote(Path(os.path.relpath(page, place)).as_posix()) if page.is_file() else ""
    return {"label": label, "link": link, "command": run.command}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
