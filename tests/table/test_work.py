from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.errors import Interrupted, UserError
from kdrun.interruption import SignalWatch
from kdrun.table.cells import Cell
from kdrun.table.progress import Board, State
from kdrun.table.work import work

from .conftest import Recorder, finish

Run = Callable[[list[str]], None]


def test_everything_is_done_in_order(cells: list[Cell], runs: Run, view: Recorder) -> None:
    work(cells, runs, view, began=time.time())
    assert [state for state in Board(cells).states.values()] == [State.DONE] * 4
    assert [told for event, told in view.events if event == "started"] == list(map(str, cells))
    assert ("said", "epoch 1/1") in view.events


def test_finished_runs_are_not_done_again(cells: list[Cell], runs: Run, view: Recorder) -> None:
    finish(cells[0])
    work(cells, runs, view, began=time.time())
    assert len([event for event, _ in view.events if event == "started"]) == 3


def test_secrets_are_not_told_of_failures(
    cells: list[Cell], runs: Run, view: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    error = UserError("the hub refuses hf_0123456789abcdef")
    work(cells, failing(runs, "KD", error), view, began=time.time())
    text = (cells[0].directory / "error.txt").read_text()
    assert "0123456789" not in text + str(view.events)
    assert "the hub refuses" in text


def failing(runs: Run, method: str, error: BaseException) -> Run:
    def run(words: list[str]) -> None:
        if f"method={method}" in words:
            raise error
        runs(words)

    return run


def test_a_failure_is_recorded_and_the_rest_goes_on(
    cells: list[Cell], runs: Run, view: Recorder
) -> None:
    work(cells, failing(runs, "KD", ValueError("no")), view, began=time.time())
    board = Board(cells)
    assert board.of(State.FAILED) == cells[:2]
    assert board.of(State.DONE) == cells[2:]
    text = (cells[0].directory / "error.txt").read_text()
    assert text.startswith("Traceback")
    assert text.rstrip().endswith("ValueError: no")
    assert ("finished", "ValueError: no") in view.events


@pytest.mark.parametrize("error", [SystemExit(3), MemoryError(), UserError("teacher at chance")])
def test_nothing_that_a_run_raises_ends_the_table(
    cells: list[Cell], runs: Run, view: Recorder, error: BaseException
) -> None:
    work(cells, failing(runs, "KD", error), view, began=time.time())
    assert len(Board(cells).of(State.DONE)) == 2
    text = (cells[0].directory / "error.txt").read_text()
    assert ("Traceback" in text) != isinstance(error, UserError)


@pytest.mark.slow
def test_failed_runs_are_tried_again_by_the_next_command(
    cells: list[Cell], runs: Run, view: Recorder
) -> None:
    work(cells, failing(runs, "KD", ValueError("no")), view, began=time.time())
    os.utime(cells[0].directory / "error.txt", (1, 1))
    os.utime(cells[1].directory / "error.txt", (1, 1))
    work(cells, runs, view, began=time.time())
    assert len(Board(cells).of(State.DONE)) == 4
    assert not (cells[0].directory / "error.txt").exists()


@pytest.mark.slow
def test_what_failed_elsewhere_meanwhile_is_not_tried(
    cells: list[Cell], runs: Run, view: Recorder
) -> None:
    began = time.time() - 10
    cells[0].directory.mkdir(parents=True)
    (cells[0].directory / "error.txt").write_text("ValueError: elsewhere\n")
    work(cells, runs, view, began=began)
    assert Board(cells).of(State.FAILED) == cells[:1]


def test_fail_fast_stops_at_the_first(cells: list[Cell], runs: Run, view: Recorder) -> None:
    run = failing(runs, "KD", ValueError("no"))
    work(cells, run, view, began=time.time(), fail_fast=True)
    board = Board(cells)
    assert (len(board.of(State.FAILED)), len(board.of(State.MISSING))) == (1, 3)


def test_an_interruption_ends_the_work_and_is_no_failure(
    cells: list[Cell], runs: Run, view: Recorder
) -> None:
    with pytest.raises(Interrupted):
        work(cells, failing(runs, "DKD", Interrupted("kdrun")), view, began=time.time())
    assert not Board(cells).of(State.FAILED)
    assert len(Board(cells).of(State.DONE)) == 2


@pytest.mark.parametrize("watched", [True, False])
def test_a_signal_is_not_lost_with_the_run_that_was_at_work(
    cells: list[Cell], runs: Run, view: Recorder, watched: bool
) -> None:
    """The run watches for signals but fails before it looks; the table stops all the same."""

    def run(words: list[str]) -> None:
        with SignalWatch() if watched else contextlib.nullcontext():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("no")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        work(cells, run, view, began=time.time())
    assert caught.value.exit_code == 143
    assert Board(cells).of(State.FAILED) == cells[:1]
    assert signal.getsignal(signal.SIGTERM) is before


WORKER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from conftest import Recorder, arm, finish
    from kdrun.table.cells import Cell
    from kdrun.table.work import work

    root, name = Path(sys.argv[1]), sys.argv[2]
    cells = [Cell(arm(root, row), seed) for row in ("A", "B", "C", "D") for seed in range(5)]
    by_words = {{tuple(cell.words): cell for cell in cells}}

    def tell(what, cell):
        with (root / "log").open("a") as log:
            log.write(f"{{what}} {{name}} {{cell.arm.row}}{{cell.seed}}\\n")

    def run(words):
        cell = by_words[tuple(words)]
        tell("start", cell)
        if name == "victim":
            time.sleep(600)
        time.sleep(0.02)
        finish(cell)
        tell("done", cell)

    work(cells, run, Recorder(), began=time.time(), poll_seconds=0.05)
"""


@pytest.mark.slow
def test_three_processes_one_killed_every_run_done_exactly_once(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).format(tests=str(Path(__file__).parent)))
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    log = tmp_path / "log"
    log.touch()

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, script, tmp_path, name], env=environment)

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)

    victim = start("victim")
    wait_for(lambda: "start victim" in log.read_text())
    others = [start("first"), start("second")]
    # All but the victim's are done, and the others wait for that one.
    wait_for(lambda: log.read_text().count("done") == 19)
    assert all(other.poll() is None for other in others)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert [other.wait(timeout=60) for other in others] == [0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    done = Counter(cell for what, _, cell in lines if what == "done")
    assert set(done.values()) == {1}
    assert len(done) == 20
    started = Counter(cell for what, _, cell in lines if what == "start")
    assert sorted(started.values()) == [1] * 19 + [2]
