"""Whole experiments that end early in a process of their own, by a signal or by a kill."""

from __future__ import annotations

import csv
import functools
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrun.distiller import Distiller
from kdrun.errors import Interrupted
from kdrun.fit import fit
from kdrun.outputs import Batch
from kdrun.stages import training as training_module
from tests.tiny import run

HOW = ("term", "step", "write")
"""See ``Ending``."""
TIMING = ("seconds", "samples_per_second", "memory_mib", "finished", "modified")
"""What differs between any two runs."""


@dataclass(frozen=True)
class Ending:
    """How and when a process ends.

    Attributes:
        how: ``term`` (SIGTERM during a step), ``step`` (SIGKILL within a step, between the gradient
            and the update), ``write`` (SIGKILL before or after a file is renamed).
        number: which step, or which rename, of the whole experiment, from 1.
        often: write a checkpoint after every step, not only after every epoch.
    """

    how: str
    number: int
    often: bool


def draw(dice: random.Random, steps: int, renames: int, how: str | None = None) -> Ending:
    """An ending somewhere in an experiment with so many steps and renames."""
    how = how or dice.choice(HOW)
    last = 2 * renames if how == "write" else steps
    return Ending(how, dice.randint(1, last), dice.random() < 0.5)


class Journal:
    """The batches that trainings have used, on disk at once.

    Args:
        path: a line for each step: whose, epoch, position, and a hash of what the batch held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, distiller: Distiller, batch: Batch) -> None:
        size = sum(p.numel() for p in distiller.networks["student"].parameters())
        name = f"{type(distiller.method).__name__}-{size}"
        line = f"{name} {distiller.epoch} {distiller.position} {content_of(batch)}\n"
        with self.path.open("a") as file:
            file.write(line)

    def batches(self) -> dict[str, set[str]]:
        """By training, epoch and position: what the batches there held."""
        seen: dict[str, set[str]] = {}
        for line in self.path.read_text().splitlines():
            place, _, content = line.rpartition(" ")
            seen.setdefault(place, set()).add(content)
        return seen


def content_of(batch: Batch) -> str:
    """A hash of everything that a network sees of a batch, and of the order of its samples."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value):
                digest.update(name.encode())
                add(value[name])
        elif isinstance(value, Tensor):
            digest.update(value.cpu().contiguous().numpy().tobytes())
        elif isinstance(value, Batch):
            for part in (value.inputs, value.target, value.index, value.mask, value.views):
                add(part)
            add(value.unlabelled)

    add(batch)
    return digest.hexdigest()[:16]


class watched:
    """While active, steps are noted in a journal, and steps and renames are counted.

    Args:
        journal: where batches are noted.
        at_step: called with the number of each step between its gradient and its update.
        at_rename: called with twice the number of each rename, less one, before it, and with twice
            its number after it.
        often: write a checkpoint after every step.
    """

    def __init__(
        self,
        journal: Journal,
        at_step: Callable[[int], None] = lambda number: None,
        at_rename: Callable[[int], None] = lambda number: None,
        often: bool = False,
    ) -> None:
        self.journal, self.at_step, self.at_rename, self.often = journal, at_step, at_rename, often
        self.steps = self.renames = 0

    def __enter__(self) -> watched:
        self._saved = Distiller._step, Distiller._update, os.replace, training_module.fit
        step, update, replace, _ = self._saved

        def noting(distiller: Distiller, batch: Batch) -> None:
            self.journal.note(distiller, batch)
            self.steps += 1
            self._new_step = True
            step(distiller, batch)

        def updating(distiller: Distiller, which: Any) -> None:
            if self._new_step:  # A step of several updates ends before the first.
                self._new_step = False
                self.at_step(self.steps)
            update(distiller, which)

        def renaming(*arguments: Any, **keywords: Any) -> None:
            self.renames += 1
            number = 2 * self.renames
            self.at_rename(number - 1)
            replace(*arguments, **keywords)
            self.at_rename(number)

        Distiller._step, Distiller._update, os.replace = noting, updating, renaming
        if self.often:
            training_module.fit = functools.partial(fit, checkpoint_seconds=0.0)
        return self

    def __exit__(self, *exception: object) -> None:
        Distiller._step, Distiller._update, os.replace, training_module.fit = self._saved


def run_until(ending: Ending, root: Path, words: tuple[str, ...], fork: bool = True) -> int:
    """Start an experiment in a process that ends so; returns its exit status.

    A negative status is the signal that killed it. A killed process cleans nothing up.

    Args:
        ending: how and when.
        root: holds the journal, and the output directory ``out``.
        words: of the command.
        fork: start from this process, which saves the imports; what compiles needs a new one.
    """
    if not fork:
        told = json.dumps([asdict(ending), str(root), words])
        return subprocess.run([sys.executable, "-m", __name__, told]).returncode
    gc.collect()  # Loaders of earlier runs have threads that must not be half there in the child.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        status = _run_and_end(ending, root, words)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        sys.__stderr__.flush()
        os._exit(status)


def _run_and_end(ending: Ending, root: Path, words: tuple[str, ...]) -> int:
    end = signal.SIGTERM if ending.how == "term" else signal.SIGKILL

    def strike(number: int) -> None:
        if number == ending.number:
            os.kill(os.getpid(), end)

    where = {"at_rename" if ending.how == "write" else "at_step": strike}
    try:
        with watched(Journal(root / "journal"), often=ending.often, **where):
            run(root / "out", *words)
    except Interrupted as stop:
        return stop.exit_code
    return 0


def outcome(root: Path) -> dict[str, Any]:
    """All that an experiment has left, by its place below the output directory, without times."""
    left: dict[str, Any] = {}
    for path in sorted((root / "out").rglob("*")):
        place = str(path.relative_to(root / "out"))
        if path.suffix == ".safetensors":
            left[place] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "metrics.csv":
            with path.open() as file:
                rows = [
                    {key: value for key, value in row.items() if key not in TIMING}
                    for row in csv.DictReader(file)
                ]
            left[place] = rows
        elif path.name == "last.ckpt":
            state = torch.load(path, weights_only=True)
            kept = ("state_dict", "optimizers", "schedulers", "epoch", "position", "step_count")
            left[place] = plain({name: state[name] for name in kept})
    return left


def plain(value: Any) -> Any:
    """Tensors as bytes, so that two states can be compared with ``==``."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def without_times(value: Any) -> Any:
    """A result without what differs between any two runs."""
    if isinstance(value, Mapping):
        return {k: without_times(v) for k, v in value.items() if k not in (*TIMING, "directory")}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


if __name__ == "__main__":
    fields, root, words = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    sys.exit(_run_and_end(Ending(**fields), Path(root), words))
