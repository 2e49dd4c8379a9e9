"""The page of a sweep: its best runs, what each option does, the trade-off, and what failed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrun.clock import clock
from kdrun.report import formats, sweep_figures
from kdrun.report.details import read_curves
from kdrun.report.drawings import PREFIX, Drawing
from kdrun.report.html import Card, Cell, number, places_of, render, sort_key
from kdrun.report.pages import provenance, without_empty_columns
from kdrun.report.sweeps import (
    BEST,
    Trial,
    decision,
    effects_of,
    finished,
    objective_of,
    pareto,
    ranked,
    shown,
    test_result,
    varied_options,
)

MOST_OPTIONS, MOST_CURVES, IN_COLOUR = 12, 200, 3
"""So many options are drawn, so many curves of validation, and so many of these in colour."""

TITLES = {"progress": "Progress", "sensitivity": "Options"}
"""Sections with drawings, by their anchors."""


def sweep_page(directory: Path, trials: Sequence[Trial]) -> str:
    """The page of a sweep.

    Args:
        directory: of the sweep.
        trials: its runs.

    Raises:
        UserError: matplotlib or jinja2 is not installed.
    """
    done = finished(trials)
    metric, direction = objective_of(done)
    in_order = ranked(done, direction)
    varied = varied_options(trials)
    figures = drawings_of(trials, varied)
    runs = [trial.run for trial in done if trial.run is not None]
    sections = [("Best", "best")] if done else []
    sections += [("Runs", "runs")]
    sections += [(TITLES[name], name) for name, found in figures.items() if found]
    failed = [trial for trial in trials if trial.status == "failed"]
    sections += [("Failed", "failed")] if failed else []
    protocols = dict.fromkeys(run.protocol for run in runs)
    front = pareto(done, direction)
    heads, rows = without_empty_columns(
        ["run", "state", *varied, metric, "test", "parameters", "took", "remark"],
        [_row(trial, varied, front) for trial in trials],
    )
    return render(
        "sweep.html",
        title=directory.resolve().name,
        description=f"Sweep of {len(trials)} runs",
        shrunk=formats.shrunken(runs),
        notes=[
            *([decision(done)] if done else []),
            *(formats.PROTOCOLS[protocol] for protocol in protocols),
        ],
        sections=[*sections, ("Provenance", "provenance")],
        cards=_cards(trials, in_order, varied),
        best=[_command(trial) for trial in in_order[:BEST]],
        heads=heads,
        rows=rows,
        states=list(dict.fromkeys(trial.status for trial in trials)),
        effects=_effects(done, varied),
        drawings=figures,
        failed=[
            {"number": trial.number, "error": trial.error, "command": _command(trial)}
            for trial in failed
        ],
        provenance=[("directory", str(directory)), *provenance(runs)],
    )


def drawings_of(trials: Sequence[Trial], varied: Sequence[str]) -> dict[str, list[Drawing]]:
    """The drawings of a sweep's page by section."""
    known = [
        trial
        for trial in trials
        if trial.status in ("done", "pruned") and trial.objective is not None
    ]
    found: dict[str, list[Drawing]] = {"progress": [], "sensitivity": []}
    done = finished(known)
    if len(known) < 2 or not done:
        return found
    metric, direction = objective_of(done)
    y = f"validation {metric}"
    values = [trial.objective for trial in known]
    pruned = [trial.status == "pruned" for trial in known]
    numbers = [trial.number for trial in known]
    svg = sweep_figures.progress(numbers, values, pruned, y, direction == "max")
    found["progress"] = [Drawing(svg), *_curves(known, metric, direction)]
    for option in varied[:MOST_OPTIONS]:
        with_it = [
            (trial.options[option], value, given_up)
            for trial, value, given_up in zip(known, values, pruned, strict=True)
            if option in trial.options
        ]
        if len({given for given, _, _ in with_it}) > 1:
            drawn = sweep_figures.option_effect(option, *map(list, zip(*with_it, strict=True)), y)
            found["sensitivity"] += [Drawing(drawn)] if drawn else []
    front = pareto(done, direction)
    if len(front) > 1:
        sized = [trial for trial in done if trial.size]
        svg = sweep_figures.trade_off(
            [trial.size for trial in sized],
            [trial.objective for trial in sized],
            [(trial.size, trial.objective) for trial in front],
            y,
        )
        found["progress"].append(Drawing(svg))
    return found


def _curves(trials: Sequence[Trial], metric: str, direction: str) -> list[Drawing]:
    """Validation over epochs of all runs, the best ones in colour."""
    curves, places = [], {}
    for trial in trials[:MOST_CURVES]:
        path = trial.directory / "metrics.csv" if trial.directory else None
        columns = read_curves(path) if path and path.is_file() else None
        known = columns is not None and PREFIX + metric in columns
        if known and np.isfinite(columns[PREFIX + metric]).any():
            places[trial.number] = len(curves)
            curves.append((columns["epoch"], columns[PREFIX + metric]))
    if len(curves) < 2:
        return []
    best = [
        (f"#{trial.number}", places[trial.number])
        for trial in ranked(finished(trials), direction)[:IN_COLOUR]
        if trial.number in places
    ]
    return [Drawing(sweep_figures.all_curves(curves, best, f"validation {metric}"))]


def _cards(trials: Sequence[Trial], in_order: Sequence[Trial], varied: Sequence[str]) -> list[Card]:
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    cards = [Card("runs", str(len(trials)), told)]
    if in_order:
        best = in_order[0]
        chosen = [f"{_last(o)} {shown(best.options[o])}" for o in varied if o in best.options]
        note = f"run #{best.number}: {', '.join(chosen)}"
        cards.append(Card("best on validation", _shown(best.objective), note))
        test = test_result(best)
        if test is not None:
            cards.append(Card("its test result", _shown(test), "weights of the same epoch"))
    seconds = sum(trial.seconds for trial in trials)
    cards.append(Card("time", clock(seconds), "of all runs together"))
    return cards


def _shown(value: float) -> str:
    return number(value, places_of(value)).text


def _last(option: str) -> str:
    return option.rpartition(".")[2]


def _command(trial: Trial) -> str:
    return f"kdrun {shlex.join(trial.words)}"


def _row(trial: Trial, varied: Sequence[str], front: Sequence[Trial]) -> dict[str, Any]:
    test = test_result(trial) if trial.status == "done" else None
    remark = trial.error
    if len(front) > 1 and trial in front:
        remark = "no other is better and smaller"
    cells = [
        Cell(f"#{trial.number}", trial.number),
        Cell(trial.status, trial.status, "left"),
        *(_option(trial.options.get(name, "")) for name in varied),
        number(trial.objective, places_of(trial.objective)),
        number(test, places_of(test)),
        Cell(f"{trial.size:,}" if trial.size else "", trial.size or ""),
        Cell(clock(trial.seconds), sort_key(trial.seconds)),
        Cell(remark, remark, "left"),
    ]
    known = trial.status == "done"
    return {"cells": cells, "state": trial.status, "known": known, "reference": not known}


def _option(value: str) -> Cell:
    found = sweep_figures.as_number(value)
    return Cell(shown(value), value if found is None else sort_key(found))


def _effects(done: Sequence[Trial], varied: Sequence[str]) -> list[list[Cell]]:
    """Rank correlation of each numeric option with the result, the strongest first."""
    effects = effects_of(done, varied)
    in_order = sorted(effects.items(), key=lambda item: -abs(item[1].estimate))
    rows = []
    for option, test in in_order:
        interval = "" if test.low is None else f"{test.low:+.2f} to {test.high:+.2f}"
        rows.append(
            [
                Cell(option, option, "left"),
                Cell(f"{test.estimate:+.2f}", test.estimate),
                Cell(interval),
                Cell(f"{test.p_value:.3f}", test.p_value),
                Cell(str(test.n), test.n),
            ]
        )
    return rows
