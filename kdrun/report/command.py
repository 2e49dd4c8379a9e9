"""``kdrun report``: tables of finished runs, from their directories alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdrun.artefacts import RESULT
from kdrun.catalogue import Catalogue, listing, nearest
from kdrun.config import compose
from kdrun.errors import ConfigErrors, UserError
from kdrun.files import typed_path, write_atomically
from kdrun.identity import run_directory
from kdrun.job import read_records
from kdrun.report import sweeps
from kdrun.report.formats import FORMATS
from kdrun.report.results import Results, results_of_runs
from kdrun.report.runs import Run, find_runs, read_run, read_runs
from kdrun.report.sweeps import Trial, is_sweep

CHOICES = {
    "format": tuple(FORMATS),
    "epoch": ("last", "best"),
    "test": ("t", "wilcoxon"),
    "direction": ("max", "min"),
    "analysis": ("paired", "correlation", "anova", "fidelity"),
    "correction": ("none", "holm"),
}
"""Options that take one of a few values."""

FREE = ("out", "metric", "baseline")
"""Options that take any text."""

OF_RUNS = ("metric", "direction", "baseline")
"""Options that only directories take: a table's file says them."""


@dataclass
class Options:
    """What is asked of a report.

    Attributes:
        targets: the name of a table, or directories of runs.
        html: whether a page is wanted.
        given: options of the report by name.
        words: what is left: options of a table.
    """

    targets: list[str] = field(default_factory=list)
    html: bool = False
    given: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def main(words: Sequence[str], catalogue: Catalogue) -> int:
    """Do what ``kdrun report <words>`` asks for; returns the exit status.

    Raises:
        UserError: something the user can mend.
    """
    options = read_options(words)
    if options.html:
        print(write_page(options, catalogue))
        return 0
    first = typed_path(options.targets[0])
    plain = len(options.targets) == 1 and not options.words and options.given.keys() <= {"out"}
    if "analysis" in options.given:
        written = analysis(options, catalogue)
    elif plain and is_sweep(first):
        written = sweeps.text(first, trials_of(first, catalogue))
    else:
        results = read_results(options, catalogue)
        written = FORMATS[options.given.get("format", "text")](results)
    if "out" in options.given:
        path = typed_path(options.given["out"])
        write_atomically(path, written)
        print(path)
    else:
        print(written.rstrip("\n"))
    return 0


def write_page(options: Options, catalogue: Catalogue) -> Path:
    """Write the page of a table or of runs; returns where: ``out``, or beside what it shows."""
    from kdrun.report.pages import run_page, table_page
    from kdrun.report.sweep_page import sweep_page
    from kdrun.table.request import read_request

    first = typed_path(options.targets[0])
    alone = len(options.targets) == 1 and ((first / RESULT).is_file() or is_sweep(first))
    needless = ("format", "analysis", "correction")
    refused = [key for key in options.given if key in needless or (alone and key != "out")]
    if refused or (alone and options.words):
        named = [*refused, *options.words][0]
        raise UserError(f"{named}: a page has everything; leave out --html or this")
    if options.targets[0] in catalogue.choices("table"):
        place = read_request([options.targets[0], *options.words]).folder / "index.html"
    else:
        place = first / "report.html"
    if "out" in options.given:
        place = typed_path(options.given["out"])
    if alone and is_sweep(first):
        page = sweep_page(first, trials_of(first, catalogue))
    elif alone:
        page = run_page(read_run(first))
    else:
        page = table_page(read_results(options, catalogue), place.parent)
    write_atomically(place, page)
    return place


def read_options(words: Sequence[str]) -> Options:
    """Take the words of the command apart.

    Raises:
        UserError: a word is not one that reports know.
    """
    options = Options()
    for word in words:
        key, equals, value = word.partition("=")
        if word == "--html":
            options.html = True
        elif word.startswith("-"):
            raise UserError(f"{word}: no such flag (flags of a report: --html)")
        elif not equals:
            options.targets.append(word)
        elif key in CHOICES and value not in CHOICES[key]:
            meant = nearest(value, CHOICES[key])
            hint = f" Did you mean {meant}?" if meant else ""
            raise UserError(f"{word}: no such {key}.{hint} ({key}: {', '.join(CHOICES[key])})")
        elif key in CHOICES or key in FREE:
            options.given[key] = value
        else:
            options.words.append(word)
    if not options.targets:
        raise UserError(
            "report takes the name of a table or directories of runs: kdrun report outputs"
        )
    return options


def analysis(options: Options, catalogue: Catalogue) -> str:
    """The statistics that are asked for, as text.

    ``paired``: every cell against its baseline over seeds. ``correlation``: of the metric with the
    others. ``anova``: how much of the variation of all results the rows and the columns explain.
    ``fidelity``: the tests of ``kdrun.report.fidelity``, of a table, of runs, or of one CSV file.
    """
    from kdrun.report import analyses, fidelity, variance

    first = typed_path(options.targets[0])
    kind, corrected = options.given["analysis"], options.given.get("correction") == "holm"
    if kind == "paired":
        return analyses.paired_text(read_results(options, catalogue), corrected)
    if kind == "correlation":
        return analyses.correlation_text(read_results(options, catalogue))
    if kind == "anova":
        return variance.text(read_results(options, catalogue))
    if first.suffix == ".csv" and first.is_file():
        outcomes = fidelity.read_outcomes(first)
    else:
        outcomes = fidelity.outcomes_of(read_results(options, catalogue))
    return fidelity.text(fidelity.analyse(outcomes), corrected)


def read_results(options: Options, catalogue: Catalogue) -> Results:
    """The results that are asked for.

    Raises:
        UserError: there is no such table or directory, or options do not go together.
    """
    name, *more = options.targets
    if name in catalogue.choices("table"):
        if more:
            raise UserError(f"{name} is a table; a report shows one at a time, without {more[0]}")
        refused = [key for key in OF_RUNS if key in options.given]
        if refused:
            raise UserError(f"{refused[0]}: the table {name} says this itself")
        return _of_table(name, options, catalogue)
    if options.words:
        key = options.words[0].partition("=")[0]
        known = listing([*CHOICES, *FREE])
        raise UserError(f"{options.words[0]}: no such option of a report: {key} (options: {known})")
    places = [typed_path(target) for target in options.targets]
    if not places[0].exists():
        meant = nearest(name, catalogue.choices("table"))
        hint = f" Did you mean the table {meant}?" if meant else ""
        raise UserError(f"{name}: neither a table nor a directory.{hint} (kdrun ls tables)")
    known = ("metric", "direction", "epoch", "baseline", "test")
    given: dict[str, Any] = {key: options.given[key] for key in known if key in options.given}
    runs: dict[Path, Run] = {}
    remarks: list[str] = []
    for place in places:
        if is_sweep(place):
            trials = trials_of(place, catalogue)
            found = [trial.run for trial in trials if trial.run is not None]
            problems = [trial.error for trial in trials if trial.status == "done" and trial.error]
        else:
            found, problems = read_runs(find_runs([place]))
        runs |= {run.directory.resolve(): run for run in found}
        remarks += problems
    if not runs:
        raise UserError(remarks[0] if remarks else f"{name}: no finished run in or below it")
    results = results_of_runs(list(runs.values()), title=" ".join(options.targets), **given)
    return replace(results, remarks=[f"left out: {remark}" for remark in dict.fromkeys(remarks)])


def trials_of(sweep: Path, catalogue: Catalogue) -> list[Trial]:
    """The runs of a sweep with their results, wherever those lie.

    A record says where its run lies once that has ended; otherwise it follows from the command. It
    is looked for where the sweep was started, as far as that can be told: here, or above
    ``<output_dir>/sweeps/<sweep>``.
    """
    trials = []
    for record in read_records(sweep / sweeps.RECORDS):
        directory = None
        place = record.directory or _directory_of(record.words, catalogue)
        if place is not None:
            roots = (Path(), *sweep.resolve().parents[2:3])
            directory = next((root / place for root in roots if (root / place).is_dir()), None)
        run, error = None, record.error
        if directory is not None and (directory / RESULT).is_file():
            try:
                run = read_run(directory)
            except UserError as problem:
                error = str(problem)
        trials.append(
            Trial(
                number=record.number,
                words=tuple(record.words),
                status=record.status,
                objective=record.objective,
                seconds=record.seconds,
                error=error,
                run=run,
                directory=directory,
            )
        )
    return trials


def _directory_of(words: Sequence[str], catalogue: Catalogue) -> Path | None:
    """Where the run of some words lies; None where the config files have changed since."""
    try:
        config = compose(words, catalogue)
    except ConfigErrors:
        return None
    return run_directory(config.values, config.names)


def _of_table(name: str, options: Options, catalogue: Catalogue) -> Results:
    from kdrun.table.request import read_request
    from kdrun.table.results import results_of_table

    request = read_request([name, *options.words])
    if request.launcher or request.fail_fast:
        raise UserError("a report runs nothing: launcher and fail_fast belong to kdrun table")
    given: dict[str, Any] = {k: v for k, v in options.given.items() if k in ("epoch", "test")}
    return results_of_table(request, catalogue, **given)
