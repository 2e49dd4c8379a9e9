"""Run one training to its end: the trainer, its checkpoints, and going on after an interruption."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kdrun import distributed, pruning
from kdrun.checkpoints import save_weights
from kdrun.data.loader import Loader
from kdrun.distiller import STUDENT, Distiller
from kdrun.errors import UserError
from kdrun.files import write_atomically, write_json
from kdrun.interruption import SignalWatch, Stopped
from kdrun.logs import EpochRow, TrainingLog
from kdrun.nonfinite import REPORT, NonFinite
from kdrun.outputs import Batch
from kdrun.process import peak_memory
from kdrun.tasks.task import Task
from kdrun.training_state import (
    CHECKPOINT,
    generator_states,
    previous_checkpoints,
    read_checkpoint,
    restore_generators,
    write_checkpoint,
)

Ties = Literal["first", "last"]

BLOCK = 32
"""Batches handed to the trainer at once; its own cost per hand-over is that of a small step."""
SKIPPED = "skipped_steps"
"""Column of the updates that an epoch left out; only where training.nonfinite is skip."""
SIGNAL_EXCHANGE = 16
"""Steps between two exchanges of received signals among the ranks of a distributed run."""


@dataclass
class Outcome:
    """What a finished training tells.

    Attributes:
        history: one row of metrics per epoch.
        best_epoch: number (from 1) of the epoch with the best objective on validation.
        seconds: wall time in all its sessions.
        gradient_shares: each loss term's share of the gradient at the first step.
    """

    history: list[EpochRow] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    gradient_shares: dict[str, float] = field(default_factory=dict)


def fit(
    distiller: Distiller,
    train: Loader,
    validation: Loader,
    *,
    trainer: Trainer,
    directory: Path,
    key: str,
    log: TrainingLog,
    watch: SignalWatch,
    keep_last: int = 2,
    product: str = "network",
    checkpoint_seconds: float = 600.0,
    limit_batches: int | None = None,
    patience: int | None = None,
    ties: Ties = "first",
) -> Outcome:
    """Train ``distiller``, or continue from ``directory/last.ckpt``.

    Writes ``last.ckpt`` (after every epoch, every ``checkpoint_seconds`` and on a signal),
    ``metrics.csv``, ``<product>.safetensors`` (the student as deployed, after the last epoch) and
    ``<product>_best.safetensors`` (at the best validation objective), and ``<role>.safetensors`` of
    every further network that was trained.

    Args:
        distiller: networks and method, on the CPU.
        train: training batches on the trainer's device.
        validation: validation batches on the trainer's device.
        trainer: see ``make_trainer``.
        directory: where to write.
        key: names what is trained; a checkpoint with another key is refused.
        log: where epochs are reported.
        watch: an asked-for stop is honoured between two steps.
        keep_last: checkpoints kept on disk while training lasts.
        product: what the weight files are called.
        checkpoint_seconds: largest time between two checkpoints of a single-process run.
        limit_batches: batches per epoch, for trials; None: all.
        patience: epochs without a better validation objective after which training ends; None: it
            never ends early.
        ties: which of epochs with equal validation objectives is the best.

    Raises:
        Stopped: a signal came; the state is saved.
        UserError: the checkpoint belongs to another configuration or cannot be read.
        NonFinite: a loss or gradient was not finite; ``nonfinite.json`` tells more, and the
            checkpoint is from before.
        Pruned: a search has given up the run (``kdrun.pruning``).
    """
    if distributed.rank() == 0:
        (directory / REPORT).unlink(missing_ok=True)
    steps = len(train) if limit_batches is None else min(limit_batches, len(train))
    saved = read_checkpoint(directory / CHECKPOINT, key, log.say)
    best = directory / f"{product}_best.safetensors"
    session = _Session(
        distiller,
        directory,
        best,
        key,
        log,
        watch,
        checkpoint_seconds=checkpoint_seconds,
        keep_last=keep_last,
        saved=saved,
        patience=patience,
        ties=ties,
    )
    trainer.callbacks.append(session)
    trainer.limit_val_batches = len(validation) if limit_batches is None else limit_batches
    if saved is None or saved["epoch"] < distiller.epochs and not session.out_of_patience():
        blocks = Blocks(train, distiller, steps)
        with warnings.catch_warnings():
            # Lightning's remarks about loaders and its own dependencies are not the user's concern.
            warnings.filterwarnings("ignore", module="lightning")
            try:
                trainer.fit(distiller, blocks, validation)
            except NonFinite as error:
                raise _reported(error, log, directory) from None
        distiller.cpu()
    else:
        distiller.load_state_dict(saved["state_dict"])
    skipped = sum(row.get(SKIPPED, 0) for row in session.outcome.history)
    if skipped:
        steps_taken = session.outcome.history[-1]["step"]
        log.say(f"{skipped:.0f} of {steps_taken:.0f} updates were left out: not finite")
    if distributed.rank() == 0:
        for older in previous_checkpoints(directory / CHECKPOINT):
            older.unlink()
        trained_on = distiller.trained_on
        save_weights(distiller.deployed(), directory / f"{product}.safetensors", trained_on)
        for role, network in distiller.networks.items():
            if role != STUDENT:
                save_weights(network, directory / f"{role}.safetensors", trained_on)
    return session.outcome


def make_trainer(
    options: Mapping[str, Any], *, epochs: int, deterministic: bool | None = None
) -> Trainer:
    """A Lightning trainer that does nothing by itself but devices, precision and processes.

    Args:
        options: the ``trainer`` config group.
        epochs: length of training.
        deterministic: overrides the group's entry.

    Raises:
        UserError: this machine has no such device.
    """
    precision = {"32": "32-true", "bf16": "bf16-mixed", "64": "64-true"}[str(options["precision"])]
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return Trainer(
            accelerator=options["accelerator"],
            devices=options["devices"],
            num_nodes=options["num_nodes"],
            strategy=options["strategy"],
            precision=precision,
            max_epochs=epochs,
            deterministic=options["deterministic"] if deterministic is None else deterministic,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"trainer: not possible on this machine: {reason}") from error


class Blocks:
    """The batches of each epoch in blocks, from wherever the distiller stands in that epoch.

    The number of blocks is the same in every epoch: after a restart in mid-epoch the blocks that
    were already trained on come out empty, so the trainer's own counts need no mending.
    """

    def __init__(self, loader: Loader, distiller: Distiller, steps: int) -> None:
        self.loader, self.distiller, self.steps = loader, distiller, steps
        # A distributed module must be entered once per backward pass.
        self.size = BLOCK if distributed.world_size() == 1 else 1

    def __len__(self) -> int:
        return -(-self.steps // self.size)

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        start = self.distiller.position
        self.loader.set_epoch(self.distiller.epoch, start)
        batches = iter(self.loader)
        for first in range(0, self.steps, self.size):
            end = min(first + self.size, self.steps)
            yield itertools.islice(batches, max(0, end - max(first, start)))


class _Session(Callback):
    """One sitting of a training: restores, reports, saves, and stops when asked."""

    def __init__(
        self,
        distiller: Distiller,
        directory: Path,
        best: Path,
        key: str,
        log: TrainingLog,
        watch: SignalWatch,
        *,
        checkpoint_seconds: float,
        keep_last: int,
        saved: dict[str, Any] | None,
        patience: int | None,
        ties: Ties,
    ) -> None:
        self.distiller, self.directory, self.best, self.key = distiller, directory, best, key
        self.reporter, self.watch = log, watch
        self.checkpoint_seconds, self.keep_last = checkpoint_seconds, keep_last
        self.saved = saved
        self.patience, self.ties = patience, ties
        self.outcome = Outcome()
        if saved is not None:
            self.outcome = Outcome(**saved["outcome"])
        distiller.after_each_step = self.after_step
        self._began = self._last_save = time.monotonic()
        self._seconds_before = self.outcome.seconds

    def on_train_start(self, trainer: Trainer, module: Distiller) -> None:
        """Restore, once the networks are on their device and the optimisers exist."""
        module.prepare_steps()
        if self.saved is not None:
            module.load_training_state(self.saved)
            restore_generators(self.saved["generators"])
            progress = trainer.fit_loop.epoch_progress.current
            progress.ready = progress.started = module.epoch
            progress.processed = progress.completed = module.epoch
            self.reporter.say(
                f"continuing at epoch {module.epoch + 1} of {module.epochs}, "
                f"step {module.position} of {module.steps_per_epoch}"
            )
            self.saved = None

    def on_train_epoch_start(self, trainer: Trainer, module: Distiller) -> None:
        """Start the clock of the epoch."""
        self._epoch_began, self._epoch_first = time.perf_counter(), module.position

    def after_step(self) -> None:
        """Show progress; save where it is time; honour a signal. Must cost next to nothing."""
        module = self.distiller
        self.reporter.step(module)
        now = time.monotonic()
        if distributed.world_size() > 1:
            if module.step_count % SIGNAL_EXCHANGE == 0:
                received = max(distributed.gather_objects(self.watch.received))
                if received:
                    self._stop(received)
        elif self.watch.received:
            self._stop(self.watch.received)
        elif now - self._last_save > self.checkpoint_seconds:
            self.save()

    def on_train_epoch_end(self, trainer: Trainer, module: Distiller) -> None:
        """Report the epoch, keep the best weights, save."""
        module.guard.check()
        row = self._row(trainer, module)
        history = self.outcome.history
        history.append(row)
        # Of equals, max gives the one that comes first.
        candidates = history if self.ties == "first" else history[::-1]
        best = max(candidates, key=lambda other: _score(other, module.task))
        if best is row:
            self.outcome.best_epoch = row["epoch"]
            if distributed.rank() == 0:
                save_weights(module.deployed(), self.best, module.trained_on)
        self.outcome.gradient_shares = module.gradient_shares
        module.sums.reset()
        module.epoch, module.position = module.epoch + 1, 0
        module.seconds_in_steps = 0.0
        if distributed.rank() == 0:
            # Before the checkpoint: killed in between, the epoch is trained and written again.
            write_atomically(self.directory / "metrics.csv", _as_csv(history))
        self._write()
        if distributed.rank() == 0:
            self.reporter.epoch(row, module.epochs)
        received = max(distributed.gather_objects(self.watch.received))
        if received and module.epoch < module.epochs:
            raise Stopped(received)
        if module.epoch < module.epochs:
            objective = row[f"validation/{module.task.objective}"]
            pruning.tell(self.reporter.name, module.epoch, objective)
        if self.out_of_patience() and module.epoch < module.epochs:
            self.reporter.say(
                f"ends after epoch {module.epoch}: none of {self.patience} epochs was better on "
                f"validation than epoch {self.outcome.best_epoch}"
            )
            trainer.should_stop = True

    def out_of_patience(self) -> bool:
        """Whether the best epoch lies so far back that training ends."""
        behind = len(self.outcome.history) - self.outcome.best_epoch
        return self.patience is not None and behind >= self.patience

    def _row(self, trainer: Trainer, module: Distiller) -> EpochRow:
        seconds = time.perf_counter() - self._epoch_began
        samples = (module.position - self._epoch_first) * self.reporter.batch_size
        row: EpochRow = {"epoch": module.epoch + 1, "step": module.step_count}
        row["learning_rate"] = module._optimizers[0].param_groups[0]["lr"]
        row |= module.sums.read()
        if module.guard.skips:
            row[SKIPPED] = module.guard.skipped
            module.guard.skipped = 0
        row |= {f"validation/{name}": value for name, value in module.validation.items()}
        row["seconds"] = seconds
        row["samples_per_second"] = samples / max(module.seconds_in_steps, 1e-9)
        row["memory_mib"] = peak_memory() / 2**20
        return row

    def save(self) -> None:
        """Write ``last.ckpt`` of sound weights; every rank takes part."""
        self.distiller.guard.check()
        self._write()

    def _write(self) -> None:
        self.outcome.seconds = self._seconds_before + time.monotonic() - self._began
        state = self.distiller.training_state() | {
            "key": self.key,
            "generators": distributed.gather_objects(generator_states()),
            "outcome": vars(self.outcome),
        }
        if distributed.rank() == 0:
            write_checkpoint(self.directory / CHECKPOINT, state, self.keep_last)
        self._last_save = time.monotonic()

    def _stop(self, received: int) -> None:
        self.save()
        raise Stopped(received)


def _reported(error: NonFinite, log: TrainingLog, directory: Path) -> NonFinite:
    """The error with all that the user needs, after its facts are written down."""
    report = directory / REPORT
    saved = (directory / CHECKPOINT).exists()
    kept = f"{CHECKPOINT} beside it is from before" if saved else "no checkpoint was written before"
    error.describe(log.name, report, kept)
    if distributed.rank() == 0:
        write_json(report, error.facts())
    return error


def _score(row: EpochRow, task: Task) -> float:
    """The validation objective, the larger the better; one that is no number is worst of all."""
    value = row[f"validation/{task.objective}"]
    if math.isnan(value):
        return -math.inf
    return value if task.direction == "max" else -value


def _as_csv(history: list[EpochRow]) -> str:
    columns = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
