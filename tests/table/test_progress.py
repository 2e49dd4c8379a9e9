from __future__ import annotations

import time

from filelock import FileLock

from kdrun.table.cells import Cell
from kdrun.table.progress import (
    Board,
    State,
    claim,
    epochs_left,
    failed_since,
    last_error_line,
    state_of,
)

from .conftest import finish


def test_states_come_from_files_and_locks(cells: list[Cell]) -> None:
    done, failed, running, missing = cells
    finish(done)
    failed.directory.mkdir(parents=True)
    (failed.directory / "error.txt").write_text("Traceback\nValueError: no\n")
    with claim(running) as claimed:
        assert claimed
        assert [state_of(cell) for cell in cells] == [
            State.DONE,
            State.FAILED,
            State.RUNNING,
            State.MISSING,
        ]
    assert state_of(running) is State.MISSING
    assert last_error_line(failed) == "ValueError: no"
    assert failed_since(failed, time.time() - 60)
    assert not failed_since(failed, time.time() + 60)
    assert not failed_since(missing, 0)
    assert last_error_line(missing) == "tried again by another process"


def test_a_damaged_file_of_a_run_does_not_stop_the_others(cells: list[Cell]) -> None:
    for cell in cells[:2]:
        finish(cell, 10)
    (cells[1].directory / "result.json").write_text('{"seconds"')
    cells[2].directory.mkdir(parents=True)
    (cells[2].directory / "error.txt").write_text("")
    board = Board(cells)
    assert board.counts() == "2 done, 1 failed, 1 missing"
    assert board.seconds_of(cells[3]) == 10
    assert last_error_line(cells[2]) == "nothing is known of it"


def test_a_run_has_one_owner(cells: list[Cell]) -> None:
    with claim(cells[0]) as first, claim(cells[0]) as second, claim(cells[1]) as other:
        assert (first, second, other) == (True, False, True)
    with claim(cells[0]) as again:
        assert again


def test_a_run_under_another_command_is_left_alone(cells: list[Cell]) -> None:
    directory = cells[0].arm.directory
    directory.mkdir(parents=True)
    with FileLock(directory / ".seed0.lock"), claim(cells[0]) as claimed:
        assert not claimed
        assert state_of(cells[0]) is State.RUNNING


def test_time_left_follows_the_finished_runs(cells: list[Cell]) -> None:
    assert Board(cells).seconds_left() is None
    finish(cells[0], 10)
    finish(cells[1], 20)
    board = Board(cells)
    assert board.counts() == "2 done, 2 missing"
    assert board.seconds_of(cells[0]) == 10
    assert board.seconds_of(cells[2]) == 15
    assert board.seconds_left() == 30


def test_shared_networks_count_once(cells: list[Cell]) -> None:
    board = Board(cells)
    assert epochs_left(cells, board.states) == {"teacher": 3, "alone": 4, "distil": 8}
    finish(cells[0])
    board.refresh()
    assert epochs_left(cells, board.states) == {"teacher": 0, "alone": 2, "distil": 6}
