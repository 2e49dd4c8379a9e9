"""Which figures a page shows, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdrun.report import figures
from kdrun.report.details import (
    Predictions,
    agreement,
    confusion,
    curves_of,
    predictions_of,
    reliability,
    right_and_wrong,
)
from kdrun.report.results import Entry, Results
from kdrun.report.runs import Run

MOST_COLUMNS, MOST_ROWS, MOST_NETWORKS, MOST_TERMS = 8, 4, 12, 12
"""A page draws so many columns; so many methods in one figure; so many networks in a matrix of
agreement; and the loss terms of so many configurations."""

CURVES = (
    f"Mean and standard deviation over seeds; the student alone, the baseline and the {MOST_ROWS} "
    "best rows."
)
PREFIX = "validation/"


@dataclass(frozen=True)
class Drawing:
    """A figure of a page: the SVG element and what is to be said of it."""

    svg: str
    caption: str = ""


def of_results(results: Results) -> dict[str, list[Drawing]]:
    """The drawings of a table's page by section; of the first columns where there are many."""
    found: dict[str, list[Drawing]] = {
        name: [] for name in ("comparison", "curves", "calibration", "agreement", "terms")
    }
    for column in results.columns[:MOST_COLUMNS]:
        entries = [results.cells[row, column] for row in results.rows]
        known = [entry for entry in entries if entry.runs]
        if not known:
            continue
        chosen = _chosen(known)
        colours = {entry.row: number for number, entry in enumerate(chosen)}
        found["comparison"].append(_comparison(column, entries))
        found["curves"] += _curves(column, chosen, colours)
        found["calibration"] += _calibration(column, chosen, results.epoch, colours)
        found["agreement"] += _agreement(column, known, results.epoch)
        found["terms"] += _terms(column, known)
    found["terms"] = found["terms"][:MOST_TERMS]
    found["sensitivity"] = _sensitivity(results)
    return found


def of_run(run: Run) -> dict[str, list[Drawing]]:
    """The drawings of a run's page by section."""
    lines = []
    colours = {network: number for number, network in enumerate(run.networks)}
    for network in run.networks:
        curves = curves_of(run, network)
        if curves is not None and PREFIX + run.metric in curves:
            x, y = curves["epoch"], curves[PREFIX + run.metric]
            colour, reference = colours[network], network != "distilled"
            lines.append(figures.Line(network, colour, x, y, reference=reference))
    found: dict[str, list[Drawing]] = {"curves": [], "calibration": [], "confusion": []}
    if lines:
        found["curves"].append(Drawing(figures.curves("Validation", lines, run.metric)))
    curves = curves_of(run, "distilled")
    if curves is not None:
        loss = figures.Line("loss", colours["distilled"], curves["epoch"], curves["loss"])
        found["curves"].append(Drawing(figures.curves("Training of the student", [loss], "loss")))
        terms = _weighted(curves)
        if terms:
            svg = figures.shares("Terms of the loss", curves["epoch"], terms)
            found["curves"].append(Drawing(svg))
    said = predictions_of(run, "last")
    if said is not None:
        diagrams = {
            network: reliability(said.confidence[network], said.predicted[network] == said.target)
            for network in run.networks
            if network in said.predicted
        }
        svg = figures.reliability_diagram("Confidence and accuracy", diagrams, colours)
        found["calibration"] = [Drawing(svg), *_agreement_of_two(said)]
        found["confusion"] = _confusions(said)
    return found


# -- of a table ------------------------------------------------------------------------------------


def _chosen(entries: Sequence[Entry]) -> list[Entry]:
    """The teacher, the student alone, the baseline and the best rows."""
    largest = entries[0].direction == "max"
    ranked = sorted(
        (e for e in entries if e.network == "distilled" and np.isfinite(e.mean)),
        key=lambda entry: entry.mean,
        reverse=largest,
    )
    best = {entry.row for entry in ranked[:MOST_ROWS]} | {entry.baseline for entry in entries}
    return [entry for entry in entries if entry.network != "distilled" or entry.row in best]


def _comparison(column: str, entries: Sequence[Entry]) -> Drawing:
    points = [
        figures.Point(e.row, e.mean, e.std, e.published, e.network != "distilled")
        for e in entries
        if e.mean is not None or e.published is not None
    ]
    return Drawing(figures.comparison(column, points, entries[0].metric))


def _curves(column: str, entries: Sequence[Entry], colours: Mapping[str, int]) -> list[Drawing]:
    lines = []
    for entry in entries:
        line = None if entry.network == "teacher" else _line(entry, colours[entry.row])
        if line is not None:
            lines.append(line)
    if not lines:
        return []
    return [Drawing(figures.curves(column, lines, f"{entries[0].metric} on validation"))]


def _line(entry: Entry, colour: int) -> figures.Line | None:
    """The validation results of a cell's runs, epoch by epoch."""
    name = PREFIX + entry.metric
    found = [curves_of(run, entry.network) for run in entry.runs]
    of_seeds = [curves for curves in found if curves is not None and name in curves]
    if not of_seeds:
        return None
    length = min(len(curves[name]) for curves in of_seeds)
    values = np.stack([curves[name][:length] for curves in of_seeds])
    mean, x = values.mean(0), of_seeds[0]["epoch"][:length]
    reference = entry.network != "distilled"
    if len(values) == 1:
        return figures.Line(entry.row, colour, x, mean, reference=reference)
    spread = values.std(0, ddof=1)
    return figures.Line(entry.row, colour, x, mean, mean - spread, mean + spread, reference)


def _calibration(
    column: str, entries: Sequence[Entry], epoch: str, colours: Mapping[str, int]
) -> list[Drawing]:
    diagrams = {}
    for entry in entries:
        found = [_of_network(predictions_of(run, epoch), entry.network) for run in entry.runs]
        known = [parts for parts in found if parts is not None]
        if known:
            confidence = np.concatenate([confidence for _, _, confidence in known])
            correct = np.concatenate([target == said for target, said, _ in known])
            diagrams[entry.row] = reliability(confidence, correct)
    return [Drawing(figures.reliability_diagram(column, diagrams, colours))] if diagrams else []


def _of_network(
    said: Predictions | None, network: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Target, prediction and confidence of one network."""
    if said is None or network not in said.predicted:
        return None
    return said.target, said.predicted[network], said.confidence[network]


def _agreement(column: str, entries: Sequence[Entry], epoch: str) -> list[Drawing]:
    answers: dict[str, np.ndarray] = {}
    for entry in entries[:MOST_NETWORKS]:
        found = _of_network(predictions_of(entry.runs[0], epoch), entry.network)
        if found is not None:
            answers[entry.row] = found[1]
    if len(answers) < 2 or len({len(said) for said in answers.values()}) > 1:
        return []
    matrix = np.array([[agreement(a, b) for b in answers.values()] for a in answers.values()])
    low = 5 * np.floor(matrix.min() / 5)
    low = low if low < 100 else 95.0
    return [Drawing(figures.heatmap(column, matrix, list(answers), "", "", low))]


def _terms(column: str, entries: Sequence[Entry]) -> list[Drawing]:
    drawings = []
    for entry in entries:
        if entry.network == "distilled":
            curves = curves_of(entry.runs[0], "distilled")
            terms = {} if curves is None else _weighted(curves)
            if len(terms) > 1:
                title = f"{entry.row}, {column}"
                drawings.append(Drawing(figures.shares(title, curves["epoch"], terms)))
    return drawings


def _weighted(curves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weighted terms of a loss, epoch by epoch."""
    mark = "weighted/"
    return {k.removeprefix(mark): v for k, v in curves.items() if k.startswith(mark)}


def _agreement_of_two(said: Predictions) -> list[Drawing]:
    """Who of the distilled student and its teacher is right."""
    if not {"distilled", "teacher"} <= said.predicted.keys():
        return []
    shares = right_and_wrong(said.target, said.predicted["distilled"], said.predicted["teacher"])
    svg = figures.bars("Student and teacher", shares, "percent of the test samples")
    return [Drawing(svg)]


def _confusions(said: Predictions) -> list[Drawing]:
    found = []
    for network in ("distilled", "teacher"):
        if network in said.predicted:
            matrix = confusion(said.target, said.predicted[network])
            labels = [str(number) for number in range(len(matrix))]
            svg = figures.heatmap(network, matrix, labels, "predicted", "true class")
            found.append(Drawing(svg))
    return found


# -- sensitivity -----------------------------------------------------------------------------------


def _sensitivity(results: Results) -> list[Drawing]:
    """The result against each numeric option in which runs of one method differ."""
    drawings = []
    for column in results.columns[:MOST_COLUMNS]:
        entries = [results.cells[row, column] for row in results.rows]
        entries = [e for e in entries if e.network == "distilled" and e.runs]
        for option in _varied(entries):
            points = _points(entries, option)
            if points:
                metric = entries[0].metric
                drawings.append(Drawing(figures.sensitivity(column, points, option, metric)))
    return drawings


def _points(entries: Sequence[Entry], option: str) -> dict[str, list[tuple[float, float]]]:
    """(value of the option, result) of every run, by method, where there are several values."""
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        value = _option(entry.runs[0], option)
        if value is not None:
            found = points.setdefault(entry.runs[0].names["method"], [])
            results = [entry.values[run.seed] for run in entry.runs]
            found += [(value, y) for y in results if np.isfinite(y)]
    return {
        method: found for method, found in points.items() if len({value for value, _ in found}) > 1
    }


def _varied(entries: Iterable[Entry]) -> list[str]:
    """Options that some run gives a number and that not all runs of its method give alike."""
    typed: dict[str, dict[str, set[str]]] = {}
    members: dict[str, int] = {}
    for entry in entries:
        method = entry.runs[0].names["method"]
        members[method] = members.get(method, 0) + 1
        for word in entry.runs[0].words():
            option, _, value = word.partition("=")
            if option != "seed" and _number(value) is not None:
                typed.setdefault(option, {}).setdefault(method, set()).add(value)
    return [
        option
        for option, of_method in typed.items()
        if any(len(values) > 1 or members[m] > 1 for m, values in of_method.items())
    ]


def _option(run: Run, option: str) -> float | None:
    """The number that a run's configuration gives an option, typed or not."""
    for word in run.words():
        name, _, value = word.partition("=")
        if name == option:
            return _number(value)
    path = run.directory / "config.yaml"
    if not path.is_file():
        return None
    import yaml

    node: Any = yaml.load(path.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for part in option.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return float(node) if isinstance(node, (int, float)) and not isinstance(node, bool) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
