"""A table's results, from the directories of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from kdrun.artefacts import RESULT
from kdrun.catalogue import Catalogue
from kdrun.errors import UserError
from kdrun.report.results import FAILED, MISSING, NOT_RUN, Entry, Results, compared, measured
from kdrun.report.runs import Run, read_run
from kdrun.table.cells import Arm, Cell
from kdrun.table.config import Column, Epoch, Row, Table
from kdrun.table.progress import ERROR, last_error_line
from kdrun.table.request import (
    Request,
    chosen_arms,
    chosen_table,
    wanted_columns,
    wanted_rows,
)


def results_of_table(
    request: Request,
    catalogue: Catalogue,
    *,
    epoch: Epoch | None = None,
    test: Literal["t", "wilcoxon"] = "t",
) -> Results:
    """The rows and columns that are asked for, beside the published numbers.

    Args:
        request: which table, and which part of it.
        catalogue: the config files.
        epoch: which weights; None: those that the table says.
        test: which paired test against the baseline.

    Raises:
        UserError: there is no such table, or a run has no such metric.
    """
    table = chosen_table(request, catalogue)
    table = replace(table, epoch=epoch or table.epoch)
    everything = Request(
        request.name, request.profile, columns=request.columns, overrides=request.overrides
    )
    arms = {(arm.row, arm.column): arm for arm in chosen_arms(everything, table, catalogue)}
    labels = wanted_columns(request, table)
    columns = [column for column in table.columns if column.label in labels]
    entries = [
        _entry(table, row, column, arms.get((table.runs_of(row).label, column.label)))
        for column in columns
        for row in table.rows
    ]
    wanted = wanted_rows(request, table)
    shown = [entry for entry in compared(entries, test) if entry.row in wanted]
    return Results(
        title=table.name,
        description=table.description,
        rows=[row.label for row in table.rows if row.label in wanted],
        columns=[column.label for column in columns],
        entries=shown,
        epoch=table.epoch,
        profile=request.profile or "",
        test=test,
    )


def _entry(table: Table, row: Row, column: Column, arm: Arm | None) -> Entry:
    blank = Entry(
        row=row.label,
        column=column.label,
        network=row.network,
        metric=column.metric,
        direction=column.direction,
        values={},
        wanted=len(table.seeds),
        missing=MISSING,
        published=row.published.get(column.label),
        source=row.source,
        baseline="" if row.network == "teacher" else table.baseline,
    )
    if arm is None:
        return replace(blank, missing=NOT_RUN, wanted=0)
    runs, failures = ended(arm, table.seeds)
    if failures:
        blank = replace(blank, missing=FAILED, failures=failures)
    return measured(blank, runs, table.epoch)


def ended(arm: Arm, seeds: Sequence[int]) -> tuple[list[Run], dict[int, str]]:
    """The runs of a configuration that have a result, and of the failed ones, by seed, why.

    A result that cannot be read is none.
    """
    runs, failures = [], {}
    for cell in (Cell(arm, seed) for seed in seeds):
        if (cell.directory / RESULT).is_file():
            try:
                runs.append(read_run(cell.directory))
            except UserError as error:
                failures[cell.seed] = f"{cell} cannot be read: {error}"
        elif (cell.directory / ERROR).is_file():
            why = last_error_line(cell)
            failures[cell.seed] = f"{cell} failed: {why} ({cell.directory / ERROR})"
    return runs, failures
