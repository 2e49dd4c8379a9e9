"""Results as a table: every cell with its runs, the published number, a test against a baseline.

What is computed here is plain data; ``kdrun.report.formats`` writes it down.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from kdrun.errors import UserError
from kdrun.report.runs import Run, by_configuration, labels, natural
from kdrun.report.statistics import Test, holm, mean_and_std, paired

MISSING, FAILED, NOT_RUN, SEVERAL = "missing", "failed", "not run", "several"
"""Why a cell has no result: nothing ran, what ran failed, the table leaves it out, or there are
several networks of that kind, so that no single number stands for them."""

REFERENCES = {"teacher": "teacher", "student alone": "alone"}
"""The first rows of a table of runs, and the networks they show."""


@dataclass(frozen=True)
class Entry:
    """One cell of a table of results.

    Attributes:
        row: its label; ``column`` likewise.
        network: whose result it is: ``teacher``, ``alone`` or ``distilled``.
        metric: what is measured; ``direction``: ``max`` or ``min`` of it is better.
        values: the result of each run by its seed.
        wanted: how many runs the cell should have; None where nobody has said.
        missing: why there is no result; empty where there is one.
        failures: of each run that has failed, by its seed: what went wrong, and where that stands.
        published: the published number; ``source``: where it is from.
        baseline: label of the row it is tested against; empty where there is none.
        test: paired test over seeds of this cell against the baseline in the same column.
        adjusted: the test's p-value after Holm's correction over all cells of the table.
        seconds: mean time that the network's training took.
        runs: the runs it is computed from.
    """

    row: str
    column: str
    network: str
    metric: str
    direction: str
    values: Mapping[int, float]
    wanted: int | None = None
    missing: str = ""
    failures: Mapping[int, str] = field(default_factory=dict)
    published: float | None = None
    source: str = ""
    baseline: str = ""
    test: Test | None = None
    adjusted: float | None = None
    seconds: float | None = None
    runs: Sequence[Run] = field(default=(), repr=False)

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.values)

    @functools.cached_property
    def summary(self) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation over runs; None where there are too few."""
        return mean_and_std(list(self.values.values())) if self.values else (None, None)

    @property
    def mean(self) -> float | None:
        """Mean over runs; None where there are none."""
        return self.summary[0]

    @property
    def std(self) -> float | None:
        """Sample standard deviation over runs; None for fewer than two."""
        return self.summary[1]

    @property
    def difference(self) -> float | None:
        """Mean minus the published number."""
        mean = self.mean
        return None if mean is None or self.published is None else mean - self.published

    @property
    def protocols(self) -> list[str]:
        """Under which protocols its runs were made."""
        return sorted({run.protocol for run in self.runs})


@dataclass(frozen=True)
class Results:
    """A table of results.

    Attributes:
        title: what it is called; ``description``: in one line.
        rows: labels in order; ``columns`` likewise.
        entries: the cells.
        epoch: which weights of trained students were tested.
        profile: the profile that shrank all runs; such results say nothing about the methods.
        test: which paired test was made.
        remarks: what is not in it, and why.
    """

    title: str
    description: str
    rows: Sequence[str]
    columns: Sequence[str]
    entries: Sequence[Entry]
    epoch: str
    profile: str = ""
    test: str = "t"
    remarks: Sequence[str] = ()

    @functools.cached_property
    def cells(self) -> dict[tuple[str, str], Entry]:
        """The cells by row and column."""
        return {(entry.row, entry.column): entry for entry in self.entries}

    @functools.cached_property
    def best(self) -> dict[str, float | None]:
        """The best mean of each column; what was not distilled does not compete."""
        return {column: self._best(column) for column in self.columns}

    def _best(self, column: str) -> float | None:
        entries = [self.cells[row, column] for row in self.rows]
        distilled = [e.mean for e in entries if e.network == "distilled"]
        means = [mean for mean in distilled if mean is not None and math.isfinite(mean)]
        if not means:
            return None
        return max(means) if entries[-1].direction == "max" else min(means)

    @property
    def data_order(self) -> str:
        """``shared`` where the runs of all seeds saw their data in one order, ``independent`` where
        each had its own, ``mixed`` where both occur; empty without runs of several seeds."""
        runs = [run for entry in self.entries if entry.n > 1 for run in entry.runs]
        orders = {"independent" if run.data_seed is None else "shared" for run in runs}
        return "mixed" if len(orders) > 1 else next(iter(orders), "")

    @property
    def protocols(self) -> list[str]:
        """Under which protocols the runs were made."""
        return sorted({name for entry in self.entries for name in entry.protocols})

    @property
    def sources(self) -> list[str]:
        """Where published numbers come from."""
        told = [entry.source for entry in self.entries if entry.published is not None]
        return list(dict.fromkeys(source for source in told if source))


def measured(entry: Entry, runs: Iterable[Run], epoch: str) -> Entry:
    """A cell with the results of its runs.

    A teacher that several runs share is one network, and counts once; one that each has trained
    along with its student does not.
    """
    runs = [run for run in runs if run.networks.get(entry.network) is not None]
    if entry.network == "teacher" and not any(run.trained_along("teacher") for run in runs):
        distinct = {run.artefacts.get("teacher", str(run.directory)): run for run in runs[::-1]}
        runs, entry = list(distinct.values()), replace(entry, wanted=None)
    values = {run.seed: run.value(entry.network, entry.metric, epoch) for run in runs}
    known = [run.training_seconds(entry.network) for run in runs]
    times = [seconds for seconds in known if seconds]
    return replace(
        entry,
        values=values,
        runs=tuple(runs),
        missing=entry.missing if not values else "",
        seconds=sum(times) / len(times) if times else None,
    )


def compared(entries: Sequence[Entry], test: Literal["t", "wilcoxon"] = "t") -> list[Entry]:
    """Cells with the paired test of each against its baseline, corrected and not."""
    by_place = {(entry.row, entry.column): entry for entry in entries}
    tested = []
    for entry in entries:
        other = by_place.get((entry.baseline, entry.column))
        fits = other is not None and other.row != entry.row and other.metric == entry.metric
        found = paired(entry.values, other.values, test) if fits and entry.values else None
        tested.append(replace(entry, test=found))
    adjusted = holm([entry.test.p_value if entry.test else None for entry in tested])
    return [replace(e, adjusted=p) for e, p in zip(tested, adjusted, strict=True)]


def results_of_runs(
    runs: Sequence[Run],
    *,
    title: str,
    metric: str | None = None,
    direction: Literal["max", "min"] | None = None,
    epoch: str = "last",
    baseline: str | None = None,
    test: Literal["t", "wilcoxon"] = "t",
) -> Results:
    """Whatever was run, as a table: methods against data sets and pairs of networks.

    Teacher and student alone come first, where all configurations of a column share them.

    Args:
        runs: the runs.
        title: of the table.
        metric: what to show; None: each task's objective.
        direction: which of its values are better; None: as for the objective.
        epoch: ``last`` or ``best``.
        baseline: label of the row to test against; None: ``kd`` where there is such a row.
        test: which paired test.

    Raises:
        UserError: there is no such baseline, or nobody has said which values of a metric that is
            no objective are better.
    """
    groups = list(by_configuration(runs).values())
    places = labels(groups)
    methods = list(dict.fromkeys(group[0].names["method"] for group in groups))
    method_of = {
        row: group[0].names["method"] for (row, _), group in zip(places, groups, strict=True)
    }
    rows = sorted(method_of, key=lambda row: (methods.index(method_of[row]), natural(row)))
    columns = list(dict.fromkeys(column for _, column in places))
    if baseline is None:
        baseline = "kd" if "kd" in rows else ""
    elif baseline not in (*REFERENCES, *rows):
        known = ", ".join([*REFERENCES, *rows])
        raise UserError(f"baseline={baseline}: no such row (rows: {known})")
    if direction is None and metric not in (None, *(run.metric for run in runs)):
        raise UserError(
            f"metric={metric}: say which of its values are better, direction=max or direction=min"
        )
    by_place = dict(zip(places, groups, strict=True))
    entries: list[Entry] = []
    for column in columns:
        members = [by_place[row, column] for row in rows if (row, column) in by_place]
        first = members[0][0]

        def blank(row: str, network: str, run: Run = first, column: str = column) -> Entry:
            return Entry(
                row=row,
                column=column,
                network=network,
                metric=metric or run.metric,
                direction=direction or run.direction,
                values={},
                missing=MISSING,
                baseline="" if network == "teacher" else baseline,
            )

        for row, network in REFERENCES.items():
            shared = _shared(members, network)
            entry = measured(blank(row, network), shared or (), epoch)
            entries.append(entry if shared is not None else replace(entry, missing=SEVERAL))
        for row in rows:
            entries.append(
                measured(blank(row, "distilled"), by_place.get((row, column), ()), epoch)
            )
    return Results(
        title=title,
        description="",
        rows=[*REFERENCES, *rows],
        columns=columns,
        entries=compared(entries, test),
        epoch=epoch,
        test=test,
    )


def _shared(groups: Iterable[Sequence[Run]], network: str) -> list[Run] | None:
    """One run per seed that tells the result of a network that all configurations share.

    None where they do not share it: their teachers, or their students alone, were trained
    differently, and no single number stands for them. Networks that were trained along with the
    student are not shared, and are left out where there are others.
    """
    groups = [[run for run in group if network in run.networks] for group in groups]
    shared = [[run for run in group if not run.trained_along(network)] for group in groups]
    if not any(shared):
        own = list(filter(None, groups))
        return None if len(own) > 1 else [run for group in own for run in group]
    of_seed: dict[int, Run] = {}
    for run in (run for group in shared for run in group):
        other = of_seed.setdefault(run.seed, run)
        if run.artefacts.get(network) != other.artefacts.get(network):
            return None
    return list(of_seed.values())
