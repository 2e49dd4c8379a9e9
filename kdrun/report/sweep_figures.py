"""Figures of sweeps: how a search went, what each option does, the trade-off against size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdrun.report.figures import (
    HEIGHT,
    INK,
    SERIES,
    blank_figure,
    legend,
    logarithmic,
    styled,
    svg_of,
    whole_epochs,
)
from kdrun.report.runs import natural

DONE, PRUNED, BEST = SERIES[0], SERIES[1], SERIES[2]
"""Colours of runs that ended, that were given up, and of the best."""

MOST_LABELS = 12
"""So many values of an option that is no number have a place on the axis."""

FEW = 5
"""So many values of a number are all told on the axis."""


def progress(
    numbers: Sequence[int], values: Sequence[float], pruned: Sequence[bool], y: str, largest: bool
) -> str:
    """Every run of a sweep in the order of their numbers, and the best of those that ended so far.

    Args:
        numbers: of the runs; ``values``: their results; ``pruned``: whether each was given up.
        y: what the result is.
        largest: whether large ones are better.
    """
    x, results, given_up = np.array(numbers), np.array(values), np.array(pruned, dtype=bool)
    with styled():
        figure, axes = blank_figure(HEIGHT + 0.3)
        axes.scatter(x[~given_up], results[~given_up], 18, color=DONE, label="run")
        if given_up.any():
            label = "given up early"
            axes.scatter(x[given_up], results[given_up], 18, color=PRUNED, marker="x", label=label)
        ended = np.where(given_up, -np.inf if largest else np.inf, results)
        best = (np.maximum if largest else np.minimum).accumulate(ended)
        known = np.isfinite(best)
        axes.step(x[known], best[known], where="post", color=BEST, label="best so far")
        axes.set(title="Runs in their order", xlabel="run", ylabel=y)
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, axes)
        return svg_of(figure, f"{y} of each run in order")


def option_effect(
    option: str, given: Sequence[str], values: Sequence[float], pruned: Sequence[bool], y: str
) -> str | None:
    """The results against one option; None where it has too many values that are no numbers.

    Args:
        option: its name; ``given``: its value in each run, as written.
        values: the results; ``pruned``: whether each run was given up.
        y: what the result is.
    """
    numbers = [as_number(text) for text in given]
    results, given_up = np.array(values), np.array(pruned, dtype=bool)
    labels = sorted(set(given), key=natural)
    if None in numbers and len(labels) > MOST_LABELS:
        return None
    with styled():
        figure, axes = blank_figure(HEIGHT)
        if None in numbers:
            x = np.array([labels.index(text) for text in given], dtype=float)
            shown = [text if len(text) < 16 else f"{text[:14]}…" for text in labels]
            turned = 30 if max(map(len, shown)) * len(shown) > 50 else 0
            axes.set_xticks(range(len(labels)), shown, rotation=turned)
            axes.set_xlim(-0.6, len(labels) - 0.4)
            for place in range(len(labels)):
                mean = results[(x == place) & ~given_up]
                if len(mean):
                    axes.hlines(mean.mean(), place - 0.25, place + 0.25, color=BEST)
        else:
            x = np.array(numbers, dtype=float)
            places = np.unique(x)
            if len(places) <= FEW:
                axes.set_xticks(places, [f"{place:g}" for place in places])
                room = 0.15 * np.ptp(places)
                axes.set_xlim(places[0] - room, places[-1] + room)
            elif x.min() > 0 and x.max() / x.min() >= 30:
                logarithmic(axes)
        axes.scatter(x[~given_up], results[~given_up], 18, color=DONE, alpha=0.8)
        axes.scatter(x[given_up], results[given_up], 18, color=PRUNED, marker="x")
        axes.set(title=option, xlabel=option, ylabel=y)
        return svg_of(figure, f"{y} against {option}")


def trade_off(
    sizes: Sequence[int], values: Sequence[float], front: Sequence[tuple[int, float]], y: str
) -> str:
    """Results against the student's size, and the runs that no other beats in both.

    Args:
        sizes: parameters of each run's student; ``values``: the results.
        front: (parameters, result) of the runs that are not beaten, by size.
        y: what the result is.
    """
    with styled():
        figure, axes = blank_figure(HEIGHT + 0.3)
        axes.scatter(sizes, values, 18, color=DONE, alpha=0.8, label="run")
        x, best = zip(*front, strict=True)
        label = "no other is better and smaller"
        axes.step(x, best, where="post", color=BEST, marker="o", markersize=4, label=label)
        if min(sizes) > 0 and max(sizes) / min(sizes) >= 8:
            logarithmic(axes)
        axes.set(title="Result and size", xlabel="parameters of the student", ylabel=y)
        legend(figure, axes)
        return svg_of(figure, f"{y} against the parameters of the student")


def all_curves(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], best: Sequence[tuple[str, int]], y: str
) -> str:
    """The curves of all runs, the best of them in colour.

    Args:
        curves: (epochs, results) of each run.
        best: label and place in ``curves`` of those in colour.
        y: what the result is.
    """
    with styled():
        figure, axes = blank_figure(HEIGHT + 0.14 * len(best))
        for x, results in curves:
            axes.plot(x, results, _mark(x), color=INK, linewidth=0.7, alpha=0.28)
        for number, (label, place) in enumerate(best):
            x, results = curves[place]
            colour = SERIES[(number + 2) % len(SERIES)]
            axes.plot(x, results, _mark(x), color=colour, label=label)
        values = np.concatenate([results[np.isfinite(results)] for _, results in curves])
        room = 0.05 * max(np.ptp(values), 1e-9)
        axes.set_ylim(values.min() - room, values.max() + room)
        axes.set(title="Validation of every run", xlabel="epoch", ylabel=y)
        whole_epochs(axes, max(len(x) for x, _ in curves))
        legend(figure, axes)
        return svg_of(figure, f"{y} of every run over epochs")


def _mark(x: np.ndarray) -> str:
    """One epoch alone is a point."""
    return "o" if len(x) == 1 else "-"


def as_number(text: str) -> float | None:
    """The number that a value is, where it is one."""
    try:
        return float(text)
    except ValueError:
        return None
