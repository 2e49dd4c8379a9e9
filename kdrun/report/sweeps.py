"""A sweep: which of its runs were best, at what size, and how to repeat them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.clock import clock
from kdrun.errors import UserError
from kdrun.report.formats import aligned
from kdrun.report.runs import Run
from kdrun.report.statistics import correlation

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
        status: ``done``, ``failed``, ``running`` or ``interrupted``.
        objective: the validation result; None where there is none.
        seconds: how long it took.
        error: the last line of what went wrong.
        run: its result, where that can be found.
    """

    number: int
    words: tuple[str, ...]
    status: str
    objective: float | None
    seconds: float
    error: str
    run: Run | None = None

    @property
    def size(self) -> int | None:
        """Parameters of the distilled student."""
        facts = self.run.networks.get("distilled", {}) if self.run else {}
        return facts.get("parameters")


def is_sweep(directory: Path) -> bool:
    """Whether a directory is that of a sweep."""
    return any((directory / RECORDS).glob("*.json"))


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The records of a sweep's runs, in their order.

    Raises:
        UserError: one is damaged.
    """
    records = []
    for path in (directory / RECORDS).glob("*.json"):
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return sorted(records, key=lambda record: record["number"])


def text(directory: Path, trials: Sequence[Trial]) -> str:
    """The best runs of a sweep, the trade-off against size, what mattered, and what failed."""
    done = [trial for trial in trials if trial.status == "done" and trial.objective is not None]
    counts = {trial.status: 0 for trial in trials}
    for trial in trials:
        counts[trial.status] += 1
    told = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    blocks = [f"sweep {directory}: {len(trials)} runs, {told}"]
    if done:
        blocks += _done(done)
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed:
        lines = ["failed"]
        for trial in failed:
            lines.append(f"  #{trial.number} {trial.error}")
            lines.append(f"     kdrun {shlex.join(trial.words)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _done(done: Sequence[Trial]) -> list[str]:
    runs = [trial.run for trial in done if trial.run is not None]
    metric, direction = (runs[0].metric, runs[0].direction) if runs else ("objective", "max")
    sign = -1.0 if direction == "max" else 1.0
    ranked = sorted(done, key=lambda trial: sign * trial.objective)
    varied = varied_options(done)
    front = {trial.number for trial in pareto(done, direction)}
    rows = [["", "run", *varied, f"validation {metric}", "test", "parameters", "took"]]
    for rank, trial in enumerate(ranked[:MOST_SHOWN], start=1):
        options = dict(word.partition("=")[::2] for word in trial.words)
        test = trial.run.value("distilled", metric, "best") if trial.run else None
        size = f"{trial.size:,}" if trial.size else ""
        mark = " *" if trial.number in front and len(front) > 1 else ""
        rows.append(
            [
                str(rank),
                f"#{trial.number}",
                *(options.get(name, "") for name in varied),
                f"{trial.objective:.4f}",
                "" if test is None else f"{test:.4f}",
                f"{size}{mark}",
                clock(trial.seconds),
            ]
        )
    lines = [aligned(rows, left=2 + len(varied))]
    if len(ranked) > MOST_SHOWN:
        lines.append(f"and {len(ranked) - MOST_SHOWN} more")
    better = "larger" if direction == "max" else "smaller"
    lines.append(f"validation decides ({better} is better); test is of the same, best epoch")
    if len(front) > 1:
        lines.append("*: no other run is both better and smaller")
    best = [f"  kdrun {shlex.join(trial.words)}" for trial in ranked[:BEST]]
    blocks = ["\n".join(lines), "\n".join(["best", *best])]
    effects = _effects(done, varied)
    return [*blocks, effects] if effects else blocks


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


def _effects(trials: Sequence[Trial], varied: Iterable[str]) -> str:
    """Rank correlation of each numeric option with the objective."""
    rows = [["option", "rho", "p", "n"]]
    for option in varied:
        pairs = []
        for trial in trials:
            given = dict(word.partition("=")[::2] for word in trial.words).get(option, "")
            try:
                pairs.append((float(given), trial.objective))
            except ValueError:
                continue
        found = correlation([x for x, _ in pairs], [y for _, y in pairs])
        if found.p_value is not None:
            rows.append([option, f"{found.estimate:+.2f}", f"{found.p_value:.3f}", str(found.n)])
    if len(rows) == 1:
        return ""
    return f"rank correlation with the validation result\n{aligned(rows)}"
