"""Tables of results as text, Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kdrun.clock import clock
from kdrun.files import json_text
from kdrun.report.alignment import aligned
from kdrun.report.results import NOT_RUN, Entry, Results
from kdrun.report.runs import Run

SHRUNK = "profile={profile}: shrunken runs that only show that everything works; not results"
SMOKE = "training=smoke: {count}, which only show that everything works; not results"
PROTOCOLS = {
    "holdout": "protocol=holdout: validation data held out of training, test data used once",
    "paper": "protocol=paper: all training data, test data seen at every epoch",
}
ORDERS = {
    "shared": "data order: the same for all seeds; the spread is that of initial weights and draws",
    "independent": "data order: another for each seed",
    "mixed": "data order: the same for all seeds in some runs, another for each seed in the others",
}
EPOCHS = {"last": "weights of the last epoch", "best": "weights of the best epoch on validation"}
TESTS = {"t": "paired t-test over seeds", "wilcoxon": "Wilcoxon's signed-rank test over seeds"}


def text(results: Results) -> str:
    """For a terminal: a block of lines for each column of the table."""
    parts = ["\n".join([_heading(results), *notes(results)])]
    for column in results.columns:
        entries = [results.cells[row, column] for row in results.rows]
        header = ["", entries[0].metric, "n", *_titles(entries), "trained in"]
        shown = _published(entries), _tested(entries)
        rows = [header]
        for entry in entries:
            optional = [part for part, wanted in zip(_beside(entry), shown, strict=True) if wanted]
            rows.append(
                [
                    entry.row,
                    value(entry),
                    count(entry),
                    *(cell for part in optional for cell in part),
                    clock(entry.seconds) if entry.seconds else "",
                ]
            )
        parts.append(f"{column}\n{aligned(rows)}")
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """An overview of means, and a table of all that is known of every cell."""
    lines = [f"# {_markdown(_heading(results))}", ""]
    lines += [f"- {_markdown(note)}" for note in notes(results)]
    matrix = _matrix(results, bold="**{}**".format, escape=_markdown)
    lines += ["", *_markdown_rows(matrix, align="l" + "r" * len(results.columns))]
    lines += ["", "## Details", ""]
    details = [list(map(_markdown, row)) for row in _details(results)]
    lines += _markdown_rows(details, align="llrrrrrr")
    return "\n".join(lines) + "\n"


def latex(results: Results) -> str:
    """Two tables for the package booktabs: the overview and the details."""
    remarks = " ".join(f"{_latex(note)}." for note in notes(results))
    matrix = _matrix(results, bold=r"\textbf{{{}}}".format, escape=_latex)
    details = [[_latex(cell) for cell in row] for row in _details(results)]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            *_latex_rows(matrix, "l" + "r" * len(results.columns)),
            *(f"% {_line(text)}" for text in (_heading(results), *notes(results))),
            "",
            *_latex_rows(details, "llrrrrrr"),
            f"\\par\\smallskip\\footnotesize {remarks}",
            "",
        ]
    )


FIELDS = (
    *("table", "profile", "column", "row", "network", "metric", "direction", "epoch", "protocol"),
    *("mean", "std", "n", "wanted", "missing", "failed", "published", "difference", "source"),
    *("baseline", "test", "pairs", "mean_difference", "statistic", "p_value", "p_holm"),
    *("training_seconds", "seeds"),
)
"""Columns of the CSV file and keys of the JSON document."""


def as_csv(results: Results) -> str:
    """One line per cell.

    A label that a spreadsheet would take for a formula has an apostrophe before it.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, FIELDS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for record in _records(results):
        flat = record | {"seeds": " ".join(map(str, record["seeds"]))}
        writer.writerow({key: _plain(value) for key, value in flat.items()})
    return stream.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


def as_json(results: Results) -> str:
    """Everything, with the result and the directory of every run."""
    document = {
        "title": results.title,
        "description": results.description,
        "profile": results.profile or None,
        "epoch": results.epoch,
        "protocols": results.protocols,
        "data_order": results.data_order or None,
        "rows": list(results.rows),
        "columns": list(results.columns),
        "remarks": list(results.remarks),
        "cells": _records(results),
    }
    return json_text(document)


FORMATS: dict[str, Callable[[Results], str]] = {
    "text": text,
    "markdown": markdown,
    "csv": as_csv,
    "latex": latex,
    "json": as_json,
}
ENDINGS = {"text": "txt", "markdown": "md", "csv": "csv", "latex": "tex", "json": "json"}


# -- parts of cells --------------------------------------------------------------------------------


def digits(entry: Entry) -> int:
    """Decimals with which a cell's numbers are shown."""
    known = [abs(v) for v in (entry.mean, entry.published) if v is not None and math.isfinite(v)]
    largest = max(known, default=100.0)
    return 2 if largest >= 10 else 3 if largest >= 1 else 4


def value(entry: Entry) -> str:
    """``71.25 ± 0.21``, the mean alone for one run, or why there is none."""
    if entry.mean is None:
        return "–" if entry.missing == NOT_RUN else entry.missing
    places = digits(entry)
    spread = "" if entry.std is None else f" ± {entry.std:.{places}f}"
    return f"{entry.mean:.{places}f}{spread}"


def is_best(entry: Entry, results: Results) -> bool:
    """Whether a cell shows the best mean of its column; so do several that read the same."""
    best = results.best[entry.column]
    if best is None or entry.mean is None or entry.network != "distilled":
        return False
    places = digits(entry)
    return f"{entry.mean:.{places}f}" == f"{best:.{places}f}"


def count(entry: Entry) -> str:
    """``3``, or ``2 of 3`` where runs are missing, ``2 of 3, 1 failed`` where one has failed."""
    if entry.wanted is not None and 0 < entry.n < entry.wanted:
        failed = f", {len(entry.failures)} failed" if entry.failures else ""
        return f"{entry.n} of {entry.wanted}{failed}"
    return str(entry.n) if entry.n else ""


def published(entry: Entry) -> str:
    """The published number."""
    return "" if entry.published is None else f"{entry.published:.{digits(entry)}f}"


def difference(entry: Entry) -> str:
    """Our mean minus the published number, with its sign; zero has none."""
    if entry.difference is None:
        return ""
    places = digits(entry)
    rounded = round(entry.difference, places)
    return f"{rounded:+.{places}f}" if rounded else f"{0:.{places}f}"


def p_value(entry: Entry) -> str:
    """The p-value of the test against the baseline; ``?`` where the runs decide nothing."""
    if entry.test is None or not entry.test.n:
        return ""
    if entry.test.p_value is None:
        return "?"
    return "<0.001" if entry.test.p_value < 0.001 else f"{entry.test.p_value:.3f}"


def _beside(entry: Entry) -> tuple[list[str], list[str]]:
    return [published(entry), difference(entry)], [p_value(entry)]


def _titles(entries: Sequence[Entry]) -> list[str]:
    titles = ["published", "difference"] if _published(entries) else []
    if _tested(entries):
        titles.append(f"p against {next(entry.baseline for entry in entries if entry.test)}")
    return titles


def _published(entries: Iterable[Entry]) -> bool:
    return any(entry.published is not None for entry in entries)


def _tested(entries: Iterable[Entry]) -> bool:
    return any(entry.test for entry in entries)


# -- parts of tables -------------------------------------------------------------------------------


def _heading(results: Results) -> str:
    return f"{results.title}: {results.description}" if results.description else results.title


def notes(results: Results) -> list[str]:
    """What must be known to read a table: its protocol, metric, test, sources, what has failed."""
    warning = shrunken_results(results)
    lines = [warning] if warning else []
    lines += [PROTOCOLS[name] for name in results.protocols]
    better = {e.metric: "larger" if e.direction == "max" else "smaller" for e in results.entries}
    metrics = ", ".join(f"{metric} ({side} is better)" for metric, side in better.items())
    lines.append(f"test {metrics}: mean ± standard deviation over n runs; {EPOCHS[results.epoch]}")
    if results.data_order:
        lines.append(ORDERS[results.data_order])
    if _tested(results.entries):
        lines.append(f"p: {TESTS[results.test]}, two-sided, not corrected; ?: cannot be decided")
    lines += [f"published: {source}" for source in results.sources]
    # Rows may be read from the same runs.
    failures = [text for entry in results.entries for text in entry.failures.values()]
    return [*lines, *dict.fromkeys(failures), *results.remarks]


def shrunken_results(results: Results) -> str:
    """The warning that a table is of shrunken runs, by its profile or by their own settings."""
    if results.profile:
        return SHRUNK.format(profile=results.profile)
    return shrunken(run for entry in results.entries for run in entry.runs)


def shrunken(runs: Iterable[Run]) -> str:
    """The warning that some runs had only ``training=smoke``; empty where none had."""
    everything = {run.directory: run.names.get("training") == "smoke" for run in runs}
    number = sum(everything.values())
    if not number:
        return ""
    count = "all runs" if number == len(everything) > 1 else f"{number} of {len(everything)} runs"
    return SMOKE.format(count="this run" if len(everything) == 1 else count)


def _matrix(
    results: Results, bold: Callable[[str], str], escape: Callable[[str], str]
) -> list[list[str]]:
    """Means of all cells with the number of runs and the published number behind them."""
    matrix = [["", *map(escape, results.columns)]]
    for row in results.rows:
        line = [escape(row)]
        for column in results.columns:
            entry = results.cells[row, column]
            cell = escape(value(entry))
            cell = bold(cell) if is_best(entry, results) else cell
            paper = f" [{published(entry)}]" if entry.published is not None else ""
            runs = f" ({count(entry)})" if entry.n else ""
            line.append(f"{cell}{runs}{paper}")
        matrix.append(line)
    return matrix


def _details(results: Results) -> list[list[str]]:
    rows = [["column", "row", "ours", "n", "published", "difference", "p", "trained in"]]
    for column in results.columns:
        for row in results.rows:
            entry = results.cells[row, column]
            rows.append(
                [
                    column,
                    row,
                    value(entry),
                    count(entry),
                    published(entry),
                    difference(entry),
                    p_value(entry),
                    clock(entry.seconds) if entry.seconds else "",
                ]
            )
    return rows


def _records(results: Results) -> list[dict[str, Any]]:
    records = []
    for entry in results.entries:
        test = entry.test
        record = {
            "table": results.title,
            "profile": results.profile or None,
            "column": entry.column,
            "row": entry.row,
            "network": entry.network,
            "metric": entry.metric,
            "direction": entry.direction,
            "epoch": results.epoch,
            "protocol": " ".join(entry.protocols) or None,
            "mean": entry.mean,
            "std": entry.std,
            "n": entry.n,
            "wanted": entry.wanted,
            "missing": entry.missing or None,
            "failed": len(entry.failures),
            "failures": entry.failures,
            "published": entry.published,
            "difference": entry.difference,
            "source": entry.source if entry.published is not None else None,
            "baseline": entry.baseline if test else None,
            "test": results.test if test else None,
            "pairs": test.n if test else None,
            "mean_difference": test.estimate if test and test.n else None,
            "statistic": test.statistic if test else None,
            "p_value": test.p_value if test else None,
            "p_holm": entry.adjusted,
            "training_seconds": entry.seconds,
            "seeds": sorted(entry.values),
            "runs": [
                {"seed": run.seed, "value": entry.values[run.seed], "directory": str(run.directory)}
                for run in entry.runs
            ],
        }
        records.append(record)
    return records


# -- spelling --------------------------------------------------------------------------------------


def _markdown_rows(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    rule = ["---:" if align[i] == "r" else "---" for i in range(len(rows[0]))]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def _latex_rows(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    head, *body = [" & ".join(row) + r" \\" for row in rows]
    begin, end = f"\\begin{{tabular}}{{{align}}}", "\\end{tabular}"
    return [begin, "\\toprule", head, "\\midrule", *body, "\\bottomrule", end]


MARKDOWN = re.compile(r"[\\|<*`~]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|\](?=\()")
"""What means something in Markdown, where it does: ``_`` inside of a word does not."""


def _markdown(cell: str) -> str:
    return MARKDOWN.sub(r"\\\g<0>", _line(cell))


def _line(text: str) -> str:
    """A label as one line: a break would end the row, or the comment, that it stands in."""
    return " ".join(text.split())


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "→": r"$\rightarrow$",
    "|": r"\textbar{}",
    # After the end of a row they would be taken for an option of it.
    "[": "{[}",
    "*": "{*}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


def _latex(cell: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in _line(cell))
