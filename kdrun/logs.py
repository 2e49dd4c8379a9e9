"""What a user sees of a run while it goes on: lines and one refreshed progress line."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from kdrun import distributed
from kdrun.clock import clock
from kdrun.redaction import redact

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from kdrun.distiller import Distiller

EpochRow = dict[str, float]
"""Metrics of one epoch by name: ``epoch``, ``learning_rate``, ``loss/...``, ``validation/...``."""

Mode = Literal["auto", "line", "plain", "off"]
REFRESH_SECONDS = 0.2


class Console:
    """Lines for the user, kept in the run's ``log.txt`` too; silent on all ranks but the first.

    Args:
        mode: ``line`` refreshes one progress line, ``plain`` writes no control characters, ``off``
            prints nothing, ``auto`` is ``line`` on a terminal and ``plain`` elsewhere.
        stream: where to print; standard output.
        label: stands before what is printed, to tell runs apart that print side by side; they have
            no refreshed line.
    """

    def __init__(self, mode: Mode = "auto", stream: TextIO | None = None, label: str = "") -> None:
        self.label = f"{label}  " if label else ""
        self.stream = stream or sys.stdout
        if mode == "auto":
            mode = "line" if self.stream.isatty() else "plain"
        if label and mode == "line":
            mode = "plain"
        self.mode = mode if distributed.rank() == 0 else "off"
        self.file: Path | None = None
        self._shown = 0

    def say(self, text: str) -> None:
        """Print a line, in place of the progress line if one is shown."""
        self.clear()
        text = redact(text)
        if self.mode != "off":
            lines = (self.label + line for line in text.split("\n"))
            print(*lines, sep="\n", file=self.stream, flush=True)
        if self.file is not None and distributed.rank() == 0:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def show(self, text: str) -> None:
        """Show ``text`` as the refreshed progress line; terminals only."""
        self.stream.write("\r" + text.ljust(self._shown))
        self.stream.flush()
        self._shown = len(text)

    def clear(self) -> None:
        """Take the progress line away."""
        if self._shown:
            self.stream.write("\r" + " " * self._shown + "\r")
            self.stream.flush()
            self._shown = 0


class TrainingLog:
    """Reports one training: a line per epoch, progress in between, and rows to external loggers.

    Args:
        console: where lines go.
        name: what is trained (``teacher``, ``alone``, ``distil``), in front of each line and in
            the names of logged metrics.
        batch_size: samples per step over all ranks.
        loggers: Lightning loggers that get each epoch's row.
        objective: the validation metric to show.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        batch_size: int,
        loggers: Sequence[Logger] = (),
        objective: str = "accuracy",
    ) -> None:
        self.console, self.name, self.batch_size = console, name, batch_size
        self.loggers, self.objective = loggers, objective
        self._next_refresh = 0.0
        self._live = console.mode == "line"

    def say(self, text: str) -> None:
        """A line about this training."""
        self.console.say(f"{self.name}: {text}")

    def step(self, module: Distiller) -> None:
        """Refresh the progress line at most every ``REFRESH_SECONDS``; terminals only."""
        if not self._live:
            return
        now = time.monotonic()
        if now < self._next_refresh:
            return
        self._next_refresh = now + REFRESH_SECONDS
        means = module.sums.read() if distributed.world_size() == 1 else {}
        seconds = module.seconds_in_steps / max(module.position, 1)
        left = (module.epochs * module.steps_per_epoch - module.step_count) * seconds
        self.console.show(
            f"{self.name}  epoch {module.epoch + 1}/{module.epochs}  "
            f"step {module.position}/{module.steps_per_epoch}  "
            f"loss {means.get('loss', float('nan')):.4f}  {clock(left)} left"
        )

    def epoch(self, row: EpochRow, epochs: int) -> None:
        """Report a finished epoch."""
        terms = "  ".join(
            f"{name.removeprefix('weighted/')} {value:.4f}"
            for name, value in row.items()
            if name.startswith("weighted/")
        )
        objective = row[f"validation/{self.objective}"]
        # There is no loss where every step of the epoch was left out.
        loss = row.get("loss", float("nan"))
        self.console.say(
            f"{self.name}  epoch {int(row['epoch'])}/{epochs}  loss {loss:.4f}  ({terms})  "
            f"val {self.objective} {objective:.2f}  {row['samples_per_second']:.0f}/s  "
            f"{clock(row['seconds'] * (epochs - row['epoch']))} left"
        )
        # MLflow keeps a metric in a file of its name, which cannot be a folder (loss/kd) as well.
        named = {"loss/total" if name == "loss" else name: value for name, value in row.items()}
        for logger in self.loggers:
            values = {f"{self.name}/{name}": value for name, value in named.items()}
            logger.log_metrics(values, step=int(row["step"]))
