"""``kdrun table NAME``: run what is missing of a table, alone or with others, and show it."""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence

from kdrun import launch
from kdrun.browse import columns, ls
from kdrun.catalogue import Catalogue
from kdrun.clock import clock
from kdrun.errors import Interrupted, UserError
from kdrun.files import write_atomically
from kdrun.report.formats import ENDINGS, FORMATS
from kdrun.report.results import Results
from kdrun.table.cells import Cell
from kdrun.table.progress import Board, State, epochs_left, last_error_line
from kdrun.table.request import Request, read_request
from kdrun.table.results import results_of_table
from kdrun.table.views import Grid, Lines
from kdrun.table.work import group_runner, runner, work
from kdrun.table.workers import chosen_cells, start_workers


def main(words: Sequence[str], flags: Sequence[str], catalogue: Catalogue) -> int:
    """Do what ``kdrun table <words>`` asks for; returns the exit status.

    0: every run is done. 1: some have failed, or were left out after a failure. 130, 143: stopped
    by a signal.

    Args:
        words: the name of the table, then options and overrides.
        flags: flags that every run needs too (``--config-dir``).
        catalogue: the config files.

    Raises:
        UserError: something the user can mend; nothing was run.
    """
    if not words:
        print(ls(catalogue, ["tables"]))
        return 0
    if launch.is_launched():
        raise UserError(
            "a table is started in one process: trainer.devices=N gives every run N of them, and "
            "launcher=slurm, or the same command again, puts several to work on the table"
        )
    request = read_request(words)
    cells = chosen_cells(request, catalogue)
    board = Board(cells)
    title = request.name + (f"  profile={request.profile}" if request.profile else "")
    if request.dry_run:
        print(dry_run(board, title))
        return 0
    began = time.time()
    command = shlex.join(["kdrun", *flags, "table", *words])
    live = sys.stdout.isatty() and not request.launcher
    view = Grid(board, title, sys.stdout) if live else Lines(board, sys.stdout)
    stopped = 0
    with contextlib.closing(view):
        try:
            if request.launcher:
                start_workers(request, flags, catalogue)
            else:
                work(
                    cells,
                    runner(catalogue, flags),
                    view,
                    began=began,
                    fail_fast=request.fail_fast,
                    run_group=group_runner(catalogue, flags),
                )
        except Interrupted as stop:
            stopped = stop.exit_code
        except KeyboardInterrupt:
            stopped = 130
    board.refresh()
    print(summary(board, title, flags))
    if stopped:
        print(f"interrupted; continue with: {command}", file=sys.stderr)
        return stopped
    results = results_of_table(request, catalogue)
    print(f"\n{FORMATS['text'](results)}\n", flush=True)
    print(write_all(results, request))
    return 0 if len(board.of(State.DONE)) == len(cells) else 1


def write_all(results: Results, request: Request) -> str:
    """Write the table in every format, as a page too where it can be drawn; returns where."""
    for name, spell in FORMATS.items():
        write_atomically(request.folder / f"table.{ENDINGS[name]}", spell(results))
    endings = ",".join(ENDINGS.values())
    places = f"{request.folder}/table.{{{endings}}}"
    if importlib.util.find_spec("matplotlib") is None:
        return places
    from kdrun.report.pages import table_page

    write_atomically(request.folder / "index.html", table_page(results, request.folder))
    return f"{places}\n{request.folder}/index.html"


def dry_run(board: Board, title: str) -> str:
    """Every configuration with the state of its runs and what it costs, and the sum of it all."""
    rows = [("row", "column", "seeds", "each trains, epochs", "takes", "command")]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in board.cells:
        groups.setdefault((cell.arm.row, cell.arm.column), []).append(cell)
    for (row, column), cells in groups.items():
        cells = sorted(cells, key=lambda cell: cell.seed)
        arm = cells[0].arm
        seeds = " ".join(f"{cell.seed}:{board.states[cell]}" for cell in cells)
        cost = ", ".join(f"{stage} {epochs}" for stage, epochs in arm.epochs.items())
        seconds = board.seconds_of(cells[0])
        takes = clock(seconds) if seconds else "?"
        rows.append((row, column, seeds, cost, takes, shlex.join(["kdrun", *arm.words])))
    left = epochs_left(board.cells, board.states)
    total = ", ".join(f"{stage} {epochs:,}" for stage, epochs in left.items() if epochs)
    seconds = board.seconds_left()
    lines = [title, columns(rows), f"{len(board.cells)} runs: {board.counts()}"]
    if total:
        lines.append(f"epochs left, shared networks once: {total}")
    if seconds:
        lines.append(f"about {clock(seconds)} left for one process at the pace of finished runs")
    return "\n".join(lines)


def summary(board: Board, title: str, flags: Sequence[str]) -> str:
    """How the table stands, and the failed runs: last line of the error, and the command."""
    lines = [f"{title}: {len(board.cells)} runs, {board.counts()}"]
    for cell in board.of(State.FAILED):
        lines.append(f"  {cell} failed: {last_error_line(cell)}")
        lines.append(f"    kdrun {shlex.join([*flags, *cell.words])}")
        lines.append(f"    {cell.directory / 'error.txt'}")
    return "\n".join(lines)
