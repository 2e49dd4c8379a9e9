"""A sweep: which of its runs were best, at what size, and how to repeat them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrun.clock import clock
from kdrun.report.alignment import aligned
from kdrun.report.runs import Run
from kdrun.report.statistics import Test, correlation

RECORDS = "jobs"
"""Folder of a sweep's directory with a JSON file for each run."""
MOST_SHOWN = 20
BEST = 3
"""So many runs are listed; of the first few, the command too."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        number: its position in the sweep.
        words: the command ``kdrun <words>`` does it again.
        status: ``done``, ``pruned``, ``failed``, ``running`` or ``interrupted``.
        objective: the validation result, of a pruned run the best one so far; None where there is
            none.
        seconds: how long it took.
        error: the last line of what went wrong, with the run or with its result.
        run: its result, where that can be found.
        directory: where it lies, finished or not; None where that cannot be told.
    """

    number: int
    words: tuple[str, ...]
    status: str
    objective: float | None
    seconds: float
    error: str
    run: Run | None = None
    directory: Path | None = None

    @property
    def options(self) -> dict[str, str]:
        """The value of each option that it was given, as written."""
        return dict(word.partition("=")[::2] for word in self.words)

    @property
    def size(self) -> int | None:
        """Parameters of the distilled student."""
        facts = self.run.networks.get("distilled", {}) if self.run else {}
        return facts.get("parameters")


def is_sweep(directory: Path) -> bool:
    """Whether a directory is that of a sweep."""
    return any((directory / RECORDS).glob("*.json"))


def text(directory: Path, trials: Sequence[Trial]) -> str:
    """The best runs of a sweep, the trade-off against size, what mattered, and what failed."""
    done = finished(trials)
    counts = {trial.status: 0 for trial in trials}
    for trial in trials:
        counts[trial.status] += 1
    told = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    blocks = [f"sweep {directory}: {len(trials)} runs, {told}"]
    if done:
        blocks += _done(done)
    pruned = [trial for trial in trials if trial.status == "pruned"]
    if pruned:
        blocks.append("\n".join(["given up early", *map(_given_up, pruned)]))
    unread = [f"  #{trial.number} {trial.error}" for trial in done if trial.error]
    if unread:
        blocks.append("\n".join(["done, but cannot be read", *unread]))
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed:
        lines = ["failed"]
        for trial in failed:
            lines.append(f"  #{trial.number} {trial.error}")
            lines.append(f"     kdrun {shlex.join(trial.words)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def finished(trials: Iterable[Trial]) -> list[Trial]:
    """The runs that ended with a result."""
    return [trial for trial in trials if trial.status == "done" and trial.objective is not None]


def objective_of(trials: Iterable[Trial]) -> tuple[str, str]:
    """The metric that the runs of a sweep were judged by on validation, and its direction."""
    run = next((trial.run for trial in trials if trial.run is not None), None)
    return (run.metric, run.direction) if run else ("objective", "max")


def decision(trials: Sequence[Trial]) -> str:
    """What the runs of a sweep were judged by, in words."""
    metric, direction = objective_of(trials)
    if all(trial.run is None for trial in trials):
        return "none of its results was found: larger ones on validation are taken to be better"
    better = "larger" if direction == "max" else "smaller"
    return f"validation {metric} decides ({better} is better); test is of the same, best epoch"


def ranked(trials: Iterable[Trial], direction: str) -> list[Trial]:
    """Runs with a result, the best first."""
    sign = -1.0 if direction == "max" else 1.0
    return sorted(trials, key=lambda trial: sign * trial.objective)


def test_result(trial: Trial) -> float | None:
    """The test result of the weights that validation chose."""
    if trial.run is None:
        return None
    return trial.run.value("distilled", trial.run.metric, "best")


def shown(value: str) -> str:
    """A value in a table: long numbers are cut, the commands have all their digits."""
    if len(value) <= 7:
        return value
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def _given_up(trial: Trial) -> str:
    return f"  #{trial.number} {trial.error}, best {trial.objective:.4f}"


def _done(done: Sequence[Trial]) -> list[str]:
    metric, direction = objective_of(done)
    in_order = ranked(done, direction)
    varied = varied_options(done)
    front = {trial.number for trial in pareto(done, direction)}
    rows = [["", "run", *varied, f"validation {metric}", "test", "parameters", "took"]]
    for rank, trial in enumerate(in_order[:MOST_SHOWN], start=1):
        test = test_result(trial)
        size = f"{trial.size:,}" if trial.size else ""
        mark = " *" if trial.number in front and len(front) > 1 else ""
        rows.append(
            [
                str(rank),
                f"#{trial.number}",
                *(shown(trial.options.get(name, "")) for name in varied),
                f"{trial.objective:.4f}",
                "" if test is None else f"{test:.4f}",
                f"{size}{mark}",
                clock(trial.seconds),
            ]
        )
    lines = [aligned(rows, left=2 + len(varied))]
    if len(in_order) > MOST_SHOWN:
        lines.append(f"and {len(in_order) - MOST_SHOWN} more")
    lines.append(decision(done))
    if len(front) > 1:
        lines.append("*: no other run is both better and smaller")
    best = [f"  kdrun {shlex.join(trial.words)}" for trial in in_order[:BEST]]
    blocks = ["\n".join(lines), "\n".join(["best", *best])]
    effects = effects_of(done, varied)
    if effects:
        rows = [["option", "rho", "p", "n"]]
        for option, test in effects.items():
            rows.append([option, f"{test.estimate:+.2f}", f"{test.p_value:.3f}", str(test.n)])
        blocks.append(f"rank correlation with the validation result\n{aligned(rows)}")
    return blocks


def varied_options(trials: Iterable[Trial]) -> list[str]:
    """The options that not all runs of a sweep share."""
    values: dict[str, set[str]] = {}
    for trial in trials:
        for word in trial.words:
            option, _, value = word.partition("=")
            values.setdefault(option, set()).add(value)
    return [option for option, found in values.items() if len(found) > 1]


def pareto(trials: Iterable[Trial], direction: str) -> list[Trial]:
    """The runs that no other run beats in both the validation result and the student's size."""
    sign = 1.0 if direction == "max" else -1.0
    known = [trial for trial in trials if trial.size is not None and trial.objective is not None]
    ranked = sorted(known, key=lambda trial: (trial.size, -sign * trial.objective))
    front: list[Trial] = []
    for trial in ranked:
        if not front or sign * trial.objective > sign * front[-1].objective:
            front.append(trial)
    return front


def effects_of(trials: Sequence[Trial], varied: Iterable[str]) -> dict[str, Test]:
    """Rank correlation of each numeric option with the objective, where there is one.

    A seed is a name, not a quantity.
    """
    effects = {}
    for option in varied:
        if option.rpartition(".")[2] == "seed":
            continue
        pairs = []
        for trial in trials:
            try:
                pairs.append((float(trial.options.get(option, "")), trial.objective))
            except ValueError:
                continue
        found = correlation([x for x, _ in pairs], [y for _, y in pairs])
        if found.p_value is not None:
            effects[option] = found
    return effects
