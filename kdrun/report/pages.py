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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun import __version__
from kdrun.clock import clock
from kdrun.errors import UserError
from kdrun.report import drawings, formats
from kdrun.report.details import read_provenance
from kdrun.report.drawings import Drawing
from kdrun.report.results import NOT_RUN, Entry, Results
from kdrun.report.runs import Run

TEMPLATES = Path(__file__).parent / "templates"
MOST_RUNS = 500
"""So many runs of a table are listed, and their ``env.json`` read."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table that can be sorted.

    Attributes:
        text: what is shown; ``key``: what is sorted by, empty for nothing.
        style: a class of the style sheet.
    """

    text: str
    key: str | float = ""
    style: str = ""


def table_page(results: Results, place: Path) -> str:
    """The page of a table of results.

    Args:
        results: the table.
        place: the directory that the page will lie in, for links to runs.

    Raises:
        UserError: matplotlib is not installed.
    """
    figures = drawings.of_results(results)
    runs = list({run.directory: run for e in results.entries for run in e.runs}.values())
    sections = [("Overview", "overview"), ("Details", "details")]
    sections += [(TITLES[name], name) for name, found in figures.items() if found]
    heads, details = _without_empty_columns(
        HEADS,
        [_detail(results.cells[row, column]) for column in results.columns for row in results.rows],
    )
    return _render(
        "table.html",
        title=results.title,
        description=results.description,
        shrunk=formats.SHRUNK.format(profile=results.profile) if results.profile else "",
        notes=formats.notes(results)[bool(results.profile) :],
        sections=[*sections, ("Provenance", "provenance")],
        columns=results.columns,
        matrix=[_matrix_line(results, row) for row in results.rows],
        any_published=any(entry.published is not None for entry in results.entries),
        heads=heads,
        details=details,
        drawings=figures,
        curves_note=drawings.CURVES,
        provenance=_provenance(runs[:MOST_RUNS]),
        runs=[_link(run, place) for run in runs[:MOST_RUNS]],
        left_out=max(0, len(runs) - MOST_RUNS),
    )


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
"""Sections with drawings, by their anchors."""


def run_page(run: Run) -> str:
    """The page of one run.

    Raises:
        UserError: matplotlib is not installed.
    """
    figures = drawings.of_run(run)
    environment = read_provenance(run)
    names = run.names
    sections = [("Results", "results")]
    sections += [(TITLES[name], name) for name, found in figures.items() if found]
    heads, rows = _networks(run)
    return _render(
        "run.html",
        title=f"{names['method']}: {names['teacher']} → {names['student']}",
        description=f"{names['dataset']}, seed {run.seed}",
        shrunk="",
        notes=[formats.PROTOCOLS[run.protocol]],
        sections=[*sections, ("Provenance", "provenance")],
        heads=heads,
        rows=rows,
        drawings=figures,
        command=run.command,
        provenance=[("directory", str(run.directory)), *_provenance([run])],
        changes=_text(run.directory / "overrides.txt"),
        config=_text(run.directory / "config.yaml"),
        difference=(environment.get("git") or {}).get("diff", ""),
    )


# -- cells -----------------------------------------------------------------------------------------


def _matrix_line(results: Results, row: str) -> dict[str, Any]:
    cells = []
    for column in results.columns:
        entry = results.cells[row, column]
        best = entry.network == "distilled" and entry.mean == results.best(column)
        style = "best" if best and entry.mean is not None else ""
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
    if not entry.difference:
        return ""
    return "good" if (entry.difference > 0) == (entry.direction == "max") else "bad"


def _detail(entry: Entry) -> dict[str, Any]:
    places = formats.digits(entry)
    mean = _number(entry.mean, places)
    if entry.mean is None:
        mean = Cell("–" if entry.missing == NOT_RUN else entry.missing, style="missing")
    cells = [
        Cell(entry.column, entry.column, "left"),
        Cell(entry.row, entry.row, "left"),
        mean,
        _number(entry.std, places),
        Cell(formats.count(entry), entry.n or ""),
        _number(entry.published, places),
        Cell(formats.difference(entry), _key(entry.difference), _sign(entry)),
        Cell(formats.p_value(entry), _key(entry.test.p_value if entry.test else None)),
        _number(entry.adjusted, 3),
        Cell(clock(entry.seconds) if entry.seconds else "", _key(entry.seconds)),
    ]
    return {
        "cells": cells,
        "column": entry.column,
        "known": entry.mean is not None,
        "reference": entry.network != "distilled",
    }


def _without_empty_columns(
    heads: Sequence[str], lines: list[dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns of the details in which something stands."""
    used = [i for i in range(len(heads)) if any(line["cells"][i].text for line in lines)]
    shown = [line | {"cells": [line["cells"][i] for i in used]} for line in lines]
    return [heads[i] for i in used], shown


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
                *(_number(values.get(name), _places(values.get(name))) for name in metrics),
                Cell(clock(seconds) if seconds else "", _key(seconds)),
            ]
        )
    return heads, rows


def _places(value: float | None) -> int:
    return 2 if value is None or abs(value) >= 10 else 4


def _number(value: float | None, places: int) -> Cell:
    return Cell("" if value is None else f"{value:.{places}f}", _key(value))


def _key(value: float | None) -> str | float:
    return "" if value is None or not math.isfinite(value) else value


# -- provenance ------------------------------------------------------------------------------------


def _provenance(runs: Iterable[Run]) -> list[tuple[str, str]]:
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
    return [*lines, ("wall time", clock(seconds))]


SHOWN = ("kdrun", "torch", "lightning", "numpy")
"""Packages whose versions are shown; all are in each run's ``env.json``."""


def _listed(values: Iterable[str], most: int = 4) -> str:
    values = sorted(values)
    shown = "; ".join(values[:most])
    return shown if len(values) <= most else f"{values[0]} … {values[-1]} ({len(values)} values)"


def _link(run: Run, place: Path) -> dict[str, str]:
    page = run.directory / "report.html"
    label = f"{run.directory.parent.name}/{run.directory.name}"
    link = Path(os.path.relpath(page, place)).as_posix() if page.is_file() else ""
    return {"label": label, "link": link, "command": run.command}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


# -- rendering -------------------------------------------------------------------------------------


def _render(template: str, **values: Any) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise UserError("pages need jinja2: pip install 'kdrun[report]'") from None
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, js = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    figures: dict[str, Sequence[Drawing]] = values.pop("drawings")
    shown = {
        name: [{"svg": Markup(drawing.svg), "caption": drawing.caption} for drawing in found]
        for name, found in figures.items()
    }
    return environment.get_template(template).render(
        css=Markup(css), js=Markup(js), version=__version__, drawings=shown, **values
    )
