from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from kdrun.table.cells import Cell
from kdrun.table.progress import Board, State, claim
from kdrun.table.views import Grid, Lines, LineSink, grid_lines

from .conftest import finish


def mixed(cells: list[Cell]) -> Board:
    """A board with a run in every state; the last cell is held by the caller."""
    finish(cells[0])
    cells[1].directory.mkdir(parents=True)
    (cells[1].directory / "error.txt").write_text("no\n")
    return Board(cells)


class Terminal(io.StringIO):
    encoding = "utf-8"


def test_lines_hold_no_control_characters(cells: list[Cell]) -> None:
    stream = io.StringIO()
    view = Lines(mixed(cells), stream)
    view.started(cells[2])
    view.said(cells[2], "epoch 1/2")
    view.finished(cells[2], 65, "")
    view.finished(cells[3], 1, "ValueError: no")
    view.waiting(2)
    view.waiting(2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "DKD / a-b / seed 0: started"
    assert lines[1].startswith("DKD / a-b / seed 0: done in 1:05 (1 done, 1 failed, 2 missing")
    assert "failed: ValueError: no" in lines[2]
    assert lines[3:] == ["waiting for other processes (2 left)"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue())


def test_the_grid_has_a_mark_per_run(cells: list[Cell]) -> None:
    board = mixed(cells)
    with claim(cells[2]):
        board.refresh()
    assert grid_lines(board, Terminal()) == ["     a-b", "KD   ✓✗ ", "DKD  ▶· "]
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert grid_lines(board, ascii_only)[1:] == ["KD   +x ", "DKD  >. "]


def test_the_grid_is_drawn_in_place(cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "20")
    stream = Terminal()
    board = mixed(cells)
    view = Grid(board, "small", stream)
    view.started(cells[2])
    view.said(cells[2], "epoch 1/2")
    view.finished(cells[2], 1, "")
    view.close()
    pictures = stream.getvalue().split("\x1b[5F\x1b[J")
    assert len(pictures) >= 4
    assert pictures[0].startswith("small  1 done, 1 failed, 2 missing")
    assert all(len(line) < 60 for line in stream.getvalue().split("\n"))


def test_a_small_terminal_gets_no_grid(cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "5")
    stream = Terminal()
    Grid(mixed(cells), "small", stream).close()
    assert "✓" not in stream.getvalue()
    assert "1 done" in stream.getvalue()


def test_a_sink_hands_on_whole_lines() -> None:
    lines: list[str] = []
    sink = LineSink(lines.append)
    print("one\ntw", end="", file=sink)
    print("o\n\nrest", end="", file=sink)
    assert lines == ["one", "two"]


def test_done_stays_done(cells: list[Cell], tmp_path: Path) -> None:
    finish(cells[0])
    board = Board(cells)
    (cells[0].directory / "artefact.json").unlink()
    board.refresh()
    assert board.states[cells[0]] is State.DONE
