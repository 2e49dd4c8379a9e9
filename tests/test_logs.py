"""What the user sees: lines, one refreshed progress line, a line per epoch."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from kdrun import logs
from kdrun.logs import Console, TrainingLog
from tests.tiny import Training


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(text: str, width: int = 200) -> list[str]:
    """What is on a terminal's screen after ``text`` was written to it."""
    lines, column = [[" "] * width], 0
    for letter in text:
        if letter == "\n":
            lines.append([" "] * width)
            column = 0
        elif letter == "\r":
            column = 0
        else:
            lines[-1][column] = letter
            column += 1
    return ["".join(line).rstrip() for line in lines]


def test_a_pipe_gets_lines_without_control_characters(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console("auto", stream)
    assert console.mode == "plain"
    console.say("one")
    console.clear()
    console.say("two")
    assert stream.getvalue() == "one\ntwo\n"


def test_a_line_takes_the_place_of_the_progress_line() -> None:
    stream = Terminal()
    console = Console("auto", stream)
    assert console.mode == "line"
    console.show("a long line of progress")
    console.show("a shorter one")
    assert shown(stream.getvalue()) == ["a shorter one"]
    console.say("said")
    console.show("again")
    assert shown(stream.getvalue()) == ["said", "again"]


def test_lines_are_kept_in_the_log_also_when_nothing_is_shown(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console("off", stream)
    console.file = tmp_path / "log.txt"
    console.say("one")
    console.say("two")
    assert stream.getvalue() == ""
    assert console.file.read_text() == "one\ntwo\n"


def test_only_the_first_rank_prints(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    console = Console("plain", stream)
    console.file = tmp_path / "log.txt"
    console.say("from rank 1")
    assert stream.getvalue() == "" and not console.file.exists()


class Rows:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def test_one_line_an_epoch_with_every_term(capsys) -> None:
    stream, logger = io.StringIO(), Rows()
    log = TrainingLog(Console("plain", stream), "distil", 64, [logger])
    row = {"epoch": 2, "step": 36, "learning_rate": 0.1, "loss": 1.25, "loss/kd": 0.5}
    row |= {"loss/supervised": 8.0, "weighted/kd": 0.45, "weighted/supervised": 0.8}
    row |= {"validation/accuracy": 91.234, "seconds": 30.0, "samples_per_second": 1234.5}
    log.epoch(row, epochs=10)
    assert stream.getvalue() == (
        "distil  epoch 2/10  loss 1.2500  (kd 0.4500  supervised 0.8000)  "
        "val accuracy 91.23  1234/s  4:00 left\n"
    )
    ((step, metrics),) = logger.rows
    assert step == 36
    # As folders and files: no metric's name is the folder of another's.
    names = list(metrics)
    assert not [a for a in names for b in names if b.startswith(f"{a}/")]
    assert metrics["distil/loss/total"] == 1.25 and metrics["distil/loss/kd"] == 0.5


def test_progress_is_refreshed_now_and_then_and_read_rarely(tmp_path: Path, monkeypatch) -> None:
    """Reading the sums waits for the device, so it happens at the rate of the screen."""
    now, read = [0.0], []
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    training = Training(tmp_path, batches=10)
    distiller = training.start()
    real = distiller.sums.read

    def reading() -> dict[str, float]:
        read.append(now[0])
        return real()

    monkeypatch.setattr(distiller.sums, "read", reading)
    stream = Terminal()
    log = TrainingLog(Console("line", stream), "alone", 64)
    for step in range(10):
        distiller.position = distiller.step_count = step + 1
        now[0] += 0.05
        log.step(distiller)
    assert len(read) == pytest.approx(0.5 / logs.REFRESH_SECONDS, abs=1)
    (line,) = shown(stream.getvalue())
    assert line.startswith("alone  epoch 1/1  step ") and line.endswith("left")


@pytest.mark.parametrize("mode", ["plain", "off"])
def test_without_a_terminal_a_step_costs_nothing(mode) -> None:
    log = TrainingLog(Console(mode, io.StringIO()), "alone", 64)
    log.step(None)  # Nothing of it is looked at.
