"""How far a table is, from the files its runs leave: done, running, failed, missing; and claims.

A run belongs to the process that holds the lock ``.seed<k>.claim`` beside its directory. The lock
is the operating system's: it goes with its process, however that ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from filelock import FileLock, Timeout

from kdrun.artefacts import MARKER, RESULT
from kdrun.errors import UserError
from kdrun.files import read_json
from kdrun.table.cells import Cell

ERROR = "error.txt"
"""File in a run's directory: left by a failure."""


class State(StrEnum):
    """How far a run is."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    MISSING = "missing"


@contextlib.contextmanager
def claim(cell: Cell) -> Iterator[bool]:
    """Take a run for this process while the block lasts; yields whether that succeeded.

    It does not where another process has the run, under this command or as a run of its own.
    """
    lock = None if _is_held(_lock(cell, "lock")) else _take(_lock(cell, "claim"))
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def claim_beside(cell: Cell, others: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Take the runs that may go side by side with one that is claimed, as many as there may be."""
    with contextlib.ExitStack() as stack:
        taken: list[Cell] = []
        for other in others:
            if len(taken) + 1 >= cell.arm.at_once:
                break
            alike = other != cell and cell.arm.group and other.arm.group == cell.arm.group
            if alike and stack.enter_context(claim(other)):
                taken.append(other)
        yield taken


def state_of(cell: Cell) -> State:
    """How far a run is; an interrupted one that nobody works on is missing."""
    directory = cell.directory
    if (directory / MARKER).is_file():
        return State.DONE
    if _is_held(_lock(cell, "claim")) or _is_held(_lock(cell, "lock")):
        return State.RUNNING
    return State.FAILED if (directory / ERROR).is_file() else State.MISSING


def failed_since(cell: Cell, moment: float) -> bool:
    """Whether a run has failed at or after ``moment`` (seconds since 1970)."""
    try:
        return (cell.directory / ERROR).stat().st_mtime >= moment
    except FileNotFoundError:
        return False


def last_error_line(cell: Cell) -> str:
    """The last line of what went wrong with a run."""
    try:
        lines = (cell.directory / ERROR).read_text(encoding="utf-8").strip().splitlines()
    except FileNotFoundError:
        return "tried again by another process"
    return lines[-1] if lines else "nothing is known of it"


def _lock(cell: Cell, kind: str) -> Path:
    return cell.arm.directory / f".seed{cell.seed}.{kind}"


def _take(path: Path) -> FileLock | None:
    """The lock of a file, or None where another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror or error}") from error
    return lock


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    lock = _take(path)
    if lock is not None:
        lock.release()
    return lock is None


class Board:
    """The states of all runs of a table, and the time that is left.

    Args:
        cells: the runs.
        read: reads the state of one.

    Attributes:
        states: as of the last ``refresh``.
    """

    def __init__(self, cells: Sequence[Cell], read: Callable[[Cell], State] = state_of) -> None:
        self.cells = cells
        self.states: dict[Cell, State] = {}
        self._read = read
        self._seconds: dict[Cell, float] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the states again; what is done stays done."""
        self.states = {
            cell: State.DONE if self.states.get(cell) is State.DONE else self._read(cell)
            for cell in self.cells
        }
        for cell in self.of(State.DONE):
            if cell not in self._seconds and (seconds := _seconds(cell)) is not None:
                self._seconds[cell] = seconds

    def of(self, state: State) -> list[Cell]:
        """The runs in a state."""
        return [cell for cell in self.cells if self.states[cell] is state]

    def counts(self) -> str:
        """``3 done, 1 running, 8 missing``."""
        numbers = {state: len(self.of(state)) for state in State}
        told = [f"{number} {state}" for state, number in numbers.items() if number]
        return ", ".join(told)

    def seconds_of(self, cell: Cell) -> float | None:
        """How long a run took or may take: the mean of its column, or else of all, so far."""
        if cell in self._seconds:
            return self._seconds[cell]
        known = self._seconds.items()
        like = [seconds for other, seconds in known if other.arm.column == cell.arm.column]
        like = like or list(self._seconds.values())
        return sum(like) / len(like) if like else None

    def seconds_left(self) -> float | None:
        """The time that is left at the pace so far, divided among the processes at work."""
        running, missing = self.of(State.RUNNING), self.of(State.MISSING)
        costs = [self.seconds_of(cell) for cell in (*running, *missing)]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(costs):
            return None
        return sum(known) / max(1, len(running))


def _seconds(cell: Cell) -> float | None:
    """How long a run took; None where its result is damaged, which the finished table tells."""
    try:
        result = read_json(cell.directory / RESULT)
        # Of runs side by side each lasts as long as all of them.
        return float(result["seconds"]) / result.get("side_by_side", 1)
    except (UserError, OSError, KeyError, TypeError):
        return None


def epochs_left(cells: Iterable[Cell], states: Mapping[Cell, State]) -> dict[str, int]:
    """Epochs of training that remain, by stage; a network that several runs share counts once."""
    left = {"teacher": 0, "alone": 0, "distil": 0}
    cells = list(cells)
    made: set[tuple[str, object]] = set()
    for cell in cells:
        if states[cell] is State.DONE:
            made |= set(_products(cell).values())
    for cell in cells:
        if states[cell] is State.DONE:
            continue
        for stage, product in _products(cell).items():
            if product not in made:
                made.add(product)
                left[stage] += cell.arm.epochs.get(stage, 0)
    return left


def _products(cell: Cell) -> dict[str, tuple[str, object]]:
    return {
        "teacher": ("teacher", cell.arm.teacher),
        "alone": ("alone", (cell.arm.student, cell.seed)),
        "distil": ("distil", cell.directory),
    }
