"""What a user sees of a table at work: a live grid on a terminal, lines anywhere else."""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Callable
from typing import Protocol, TextIO

from kdrun.clock import clock
from kdrun.table.cells import Cell
from kdrun.table.progress import Board, State

REFRESH_SECONDS = 2.0
MARKS = {State.DONE: "✓", State.RUNNING: "▶", State.FAILED: "✗", State.MISSING: "·"}
PLAIN_MARKS = {State.DONE: "+", State.RUNNING: ">", State.FAILED: "x", State.MISSING: "."}


class View(Protocol):
    """Told what happens in this process."""

    def started(self, cell: Cell) -> None:
        """A run begins."""

    def said(self, cell: Cell, line: str) -> None:
        """A run has printed a line."""

    def finished(self, cell: Cell, seconds: float, error: str) -> None:
        """A run has ended; ``error`` is empty where it went well."""

    def waiting(self, running: int) -> None:
        """All runs that remain are being done by other processes."""

    def close(self) -> None:
        """Nothing more happens."""


class Lines:
    """A line per event, for pipes and files.

    Args:
        board: the states of the runs.
        stream: where to print.
    """

    def __init__(self, board: Board, stream: TextIO) -> None:
        self.board, self.stream = board, stream
        self._told_to_wait = False

    def started(self, cell: Cell) -> None:
        """Say which run begins."""
        self._told_to_wait = False
        self._say(f"{cell}: started")

    def said(self, cell: Cell, line: str) -> None:
        """Nothing: the run's own lines are in its ``log.txt``."""

    def finished(self, cell: Cell, seconds: float, error: str) -> None:
        """Say how a run ended and how many are left."""
        self.board.refresh()
        left = self.board.seconds_left()
        remains = f" ({self.board.counts()}{f'; {clock(left)} left' if left else ''})"
        self._say(
            f"{cell}: {f'failed: {error}' if error else f'done in {clock(seconds)}'}{remains}"
        )

    def waiting(self, running: int) -> None:
        """Say once that others do the rest."""
        if not self._told_to_wait:
            self._say(f"waiting for other processes ({running} left)")
        self._told_to_wait = True

    def close(self) -> None:
        """Nothing to clear away."""

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class Grid:
    """One character per run in a grid that is drawn again and again, for terminals.

    Args:
        board: the states of the runs.
        title: what the table is called.
        stream: the terminal.
    """

    def __init__(self, board: Board, title: str, stream: TextIO) -> None:
        self.board, self.title, self.stream = board, title, stream
        self._now = ""
        self._lines = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.draw()
        self._refresher = threading.Thread(target=self._refresh, daemon=True)
        self._refresher.start()

    def started(self, cell: Cell) -> None:
        """Show which run is at work here."""
        self._now = f"{cell}: started"
        self.draw()

    def said(self, cell: Cell, line: str) -> None:
        """Show the last line of the run at work here."""
        self._now = f"{cell}: {line}"
        self.draw()

    def finished(self, cell: Cell, seconds: float, error: str) -> None:
        """Show how the run ended."""
        self._now = f"{cell}: {f'failed: {error}' if error else f'done in {clock(seconds)}'}"
        self.draw()

    def waiting(self, running: int) -> None:
        """Show that others do the rest."""
        self._now = f"waiting for other processes ({running} left)"

    def close(self) -> None:
        """Draw for the last time and leave the grid where it is."""
        self._closed.set()
        self._refresher.join()
        self._now = ""
        self.draw()

    def draw(self) -> None:
        """Draw the grid in place of the one before."""
        with self._lock:
            self.board.refresh()
            size = shutil.get_terminal_size()
            lines = [line[: size.columns - 1] for line in self._picture(size)]
            up = f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
            self.stream.write(up + "\n".join(lines) + "\n")
            self.stream.flush()
            self._lines = len(lines)

    def _picture(self, size: os.terminal_size) -> list[str]:
        left = self.board.seconds_left()
        head = f"{self.title}  {self.board.counts()}"
        lines = [head + (f"  about {clock(left)} left" if left else "")]
        grid = grid_lines(self.board, self.stream)
        if len(grid) <= size.lines - 3 and max(map(len, grid)) < size.columns:
            lines += grid
        return [*lines, self._now]

    def _refresh(self) -> None:
        while not self._closed.wait(REFRESH_SECONDS):
            self.draw()


def grid_lines(board: Board, stream: TextIO) -> list[str]:
    """The grid: rows and columns of the table, one mark per seed."""
    unicode = (stream.encoding or "").lower().replace("-", "").startswith("utf")
    marks = MARKS if unicode else PLAIN_MARKS
    rows = list(dict.fromkeys(cell.arm.row for cell in board.cells))
    columns = list(dict.fromkeys(cell.arm.column for cell in board.cells))
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in board.cells:
        cells.setdefault((cell.arm.row, cell.arm.column), []).append(cell)
    table = [["", *columns]]
    for row in rows:
        line = [row]
        for column in columns:
            of_cell = sorted(cells.get((row, column), []), key=lambda cell: cell.seed)
            line.append("".join(marks[board.states[cell]] for cell in of_cell))
        table.append(line)
    widths = [max(len(line[i]) for line in table) for i in range(len(columns) + 1)]
    return [
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) for line in table
    ]


class LineSink(io.TextIOBase):
    """A stream that hands on each line written to it."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._rest = take, ""

    def write(self, text: str) -> int:
        """Take some text."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._take(line.strip())
        return len(text)
