"""Work on a table: claim a run, do it, go on after failures, until nothing is left."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from kdrun.artefacts import MARKER
from kdrun.catalogue import Catalogue
from kdrun.errors import Interrupted, UserError
from kdrun.files import write_atomically
from kdrun.interruption import SignalWatch
from kdrun.members import member_run
from kdrun.redaction import redact
from kdrun.table.cells import Cell
from kdrun.table.progress import ERROR, claim, claim_beside, failed_since
from kdrun.table.views import LineSink, View

POLL_SECONDS = 1.0
"""Between two looks for work while other processes do all that is left."""

Run = Callable[[list[str]], None]
"""Does the run of some overrides; raises where it fails."""

RunGroup = Callable[[Sequence[Cell]], list[BaseException | None]]
"""Does several runs side by side; returns what went wrong with each, None where nothing did."""


def work(
    cells: Sequence[Cell],
    run: Run,
    view: View,
    *,
    began: float,
    fail_fast: bool = False,
    poll_seconds: float = POLL_SECONDS,
    run_group: RunGroup | None = None,
) -> None:
    """Do every run that is neither done nor failed since ``began``, with whoever else is at it.

    A run that failed before is tried again, once. Returns when every run is done or has failed;
    those of other processes are waited for, and taken over where such a process dies.

    Args:
        cells: the runs, in the order in which they are best done.
        run: does one; its output is shown by ``view``.
        view: told what happens.
        began: when this work on the table began, seconds since 1970.
        fail_fast: stop at the first failure, also at one of another process.
        poll_seconds: see ``POLL_SECONDS``.
        run_group: does runs side by side where cells say that theirs may; None: one by one.

    Raises:
        Interrupted: a signal stopped a run after it was saved.
    """
    tried: set[Cell] = set()
    with SignalWatch() as watch:
        while True:
            # A run that was already failing, or ending, has not looked at the signal.
            if watch.received:
                raise Interrupted("kdrun table", signal_number=watch.received)
            left = [cell for cell in cells if not (cell.directory / MARKER).is_file()]
            failed = [cell for cell in left if cell in tried or failed_since(cell, began)]
            untried = [cell for cell in left if cell not in failed]
            if not untried or (fail_fast and failed):
                return
            for cell in untried:
                with claim(cell) as claimed:
                    if claimed:
                        with claim_beside(cell, untried if run_group else ()) as others:
                            tried |= {cell, *others}
                            _attempt([cell, *others], run, run_group, view, began)
                        break
            else:
                view.waiting(len(untried))
                time.sleep(poll_seconds)


def _attempt(
    cells: Sequence[Cell], run: Run, run_group: RunGroup | None, view: View, began: float
) -> None:
    """Do runs that this process has claimed."""
    # Some may have ended between the look for work and the claim.
    cells = [
        cell
        for cell in cells
        if not (cell.directory / MARKER).is_file() and not failed_since(cell, began)
    ]
    if not cells:
        return
    for cell in cells:
        (cell.directory / ERROR).unlink(missing_ok=True)
        view.started(cell)
    start = time.monotonic()
    sink = LineSink(lambda line: view.said(cells[0], line))
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            if run_group is None or len(cells) == 1:
                errors = [_run_one(run, cells[0])]
            else:
                errors = run_group(cells)
    finally:
        _release_memory()
    seconds = time.monotonic() - start
    interrupted = [error for error in errors if isinstance(error, Interrupted)]
    for cell, error in zip(cells, errors, strict=True):
        if error not in interrupted:
            view.finished(cell, seconds, _recorded(cell, error))
    if interrupted:
        raise interrupted[0]


def _run_one(run: Run, cell: Cell) -> BaseException | None:
    try:
        run(cell.words)
    except (Exception, SystemExit) as error:
        return error
    return None


def _recorded(cell: Cell, error: BaseException | None) -> str:
    """Leave ``error.txt`` where a run has failed; returns its last line, or nothing."""
    if error is None:
        return ""
    text = str(error)
    if not isinstance(error, UserError):
        text = "".join(traceback.format_exception(error))
    text = redact(text.rstrip()) or type(error).__name__
    write_atomically(cell.directory / ERROR, f"{text}\n")
    return text.splitlines()[-1]


def _release_memory() -> None:
    """Free what a run has left, on the GPU too, for the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def runner(catalogue: Catalogue, flags: Sequence[str]) -> Run:
    """What does a run in this process."""

    def run(words: list[str]) -> None:
        from kdrun.run import run as run_words

        exit_code = run_words(words, flags, catalogue).exit_code
        if exit_code in (130, 143):
            raise Interrupted("kdrun", signal_number=exit_code - 128)
        if exit_code != 0:
            raise UserError(f"its processes ended with exit status {exit_code}; see log.txt")

    return run


def group_runner(catalogue: Catalogue, flags: Sequence[str]) -> RunGroup:
    """What does several runs side by side in this process."""

    def run_group(cells: Sequence[Cell]) -> list[BaseException | None]:
        from kdrun.run import run_beside

        runs = [member_run(str(cell), cell.words, catalogue) for cell in cells]
        ended = run_beside(runs, flags)
        return [end if isinstance(end, BaseException) else None for end in ended]

    return run_group
