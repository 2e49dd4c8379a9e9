"""Trainings that end in a second: whole experiments, and the engine by itself."""

from __future__ import annotations

import functools
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdrun import distributed
from kdrun.assembly import Assembly, assemble
from kdrun.build import instantiate
from kdrun.catalogue import open_catalogue
from kdrun.config import Config, compose
from kdrun.data.module import DataModule
from kdrun.distiller import Distiller, Optimization
from kdrun.experiment import run_experiment
from kdrun.fit import Outcome, fit, make_trainer
from kdrun.identity import run_directory
from kdrun.interruption import SignalWatch
from kdrun.logs import Console, TrainingLog
from kdrun.method import Method
from kdrun.models.mlp import MLP
from kdrun.models.small_cnn import SmallCNN
from kdrun.stages.train import Supervised
from kdrun.tasks.classification import Classification
from kdrun.tasks.task import Task

WORDS = (
    "student=small_cnn",
    "teacher=mlp",
    "training=smoke",
    "trainer=cpu",
    "trainer.progress=off",
)
"""One epoch each of a perceptron and a small CNN on the digits."""


# -- whole experiments -----------------------------------------------------------------------------


@functools.cache
def composed(*words: str) -> Config:
    return compose(words, open_catalogue())


def tiny_config(root: Path, *words: str) -> Config:
    """The configuration of ``WORDS`` and further words; a later word replaces an earlier one."""
    chosen = {word.partition("=")[0]: word for word in (*WORDS, f"output_dir={root}", *words)}
    return composed(*chosen.values())


def run(root: Path, *words: str) -> tuple[dict[str, Any], Path]:
    """Run a tiny experiment; returns its result and its directory."""
    config = tiny_config(root, *words)
    result = run_experiment(
        config.values, names=config.names, overrides=list(words), command=list(words)
    )
    return result, run_directory(config.values, config.names)


# -- the engine by itself --------------------------------------------------------------------------


@functools.cache
def digits() -> DataModule:
    """The digits, split; 1,102 training images are 18 batches of 64."""
    data = instantiate(composed().values["dataset"])
    data.prepare()
    return data


def task() -> Classification:
    return Classification(num_classes=10)


def mlp(seed: int, *hidden: int) -> nn.Module:
    """A perceptron, the same one for the same seed; it has no batch normalisation."""
    torch.manual_seed(seed)
    return MLP(num_classes=10, input_shape=(1, 8, 8), hidden=hidden or (32,))


def small_cnn(seed: int) -> nn.Module:
    """A CNN with batch normalisation, the same one for the same seed."""
    torch.manual_seed(seed)
    return SmallCNN(num_classes=10, in_channels=1, widths=(4, 8, 8))


def sgd(parameters: Sequence[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)


@dataclass
class Training:
    """A training with everything that a test may want to change; ``start`` builds, ``run`` trains.

    In a process group it is this rank's part of the training.

    The same settings give the same training, however often it is started.
    """

    directory: Path
    student: Callable[[], nn.Module] = lambda: mlp(1)
    method: Callable[[], Method] = Supervised
    teachers: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    optimizer: Callable[[Sequence[nn.Parameter]], Optimizer] = sgd
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    epochs: int = 1
    batch_size: int = 64
    accumulate: int = 1
    clip_norm: float | None = None
    ema_decay: float | None = None
    nonfinite: Any = "stop"
    patience: int | None = None
    ties: Any = "first"
    of_roles: Mapping[str, Any] = field(default_factory=dict)
    batches: int | None = None
    checkpoint_seconds: float = 600.0
    keep_last: int = 2
    precision: Any = 32
    task: Task = field(default_factory=task)
    data: Callable[[], DataModule] = digits
    key: str = "tiny"
    loggers: Sequence[Any] = ()

    def start(self) -> Distiller:
        teachers = {role: build() for role, build in self.teachers.items()}
        data = self.data()
        self.assembly: Assembly = assemble(
            self.method(), self.student(), teachers, task=self.task, data=data, seed=0
        )
        place = {"device": "cpu", "dtype": torch.float64 if self.precision == 64 else torch.float32}
        place |= {"rank": distributed.rank(), "world_size": distributed.world_size()}
        method = self.assembly.method
        self.train = data.train(
            batch_size=self.batch_size,
            seed=0,
            views=method.views,
            unlabelled=method.unlabelled,
            **place,
        )
        self.validation = data.validation(batch_size=256, **place)
        self.distiller = Distiller(
            task=self.task,
            method=method,
            student=self.assembly.student,
            teachers=self.assembly.teachers,
            taps=self.assembly.taps,
            optimization=Optimization(
                self.optimizer,
                self.scheduler,
                self.accumulate,
                self.clip_norm,
                self.ema_decay,
                self.nonfinite,
                self.of_roles,
            ),
            epochs=self.epochs,
            steps_per_epoch=self.batches or len(self.train),
        )
        self.distiller.global_batch = lambda position: data.samples_at(position, self.batch_size)
        method.prepare(self.distiller.frozen, self.train)
        return self.distiller

    def run(self, watch: SignalWatch | StopAt | None = None) -> Outcome:
        distiller = self.start()
        several = distributed.world_size() > 1
        words = ("trainer=ddp", "trainer.accelerator=cpu") if several else ("trainer=cpu",)
        options = composed(*words).values["trainer"] | {"precision": self.precision}
        if isinstance(watch, StopAt):
            watch.distiller = distiller
        self.console = Console("off")
        self.console.file = self.directory / "log.txt"
        self.directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        random.seed(0)
        return fit(
            distiller,
            self.train,
            self.validation,
            trainer=make_trainer(options, epochs=self.epochs),
            directory=self.directory,
            key=self.key,
            log=TrainingLog(self.console, "tiny", self.batch_size, self.loggers),
            watch=watch or SignalWatch(),
            checkpoint_seconds=self.checkpoint_seconds,
            keep_last=self.keep_last,
            limit_batches=self.batches,
            patience=self.patience,
            ties=self.ties,
        )

    def trained(self, watch: SignalWatch | StopAt | None = None) -> dict[str, Tensor]:
        """Train, and give the student's state."""
        self.run(watch)
        return state_of(self.distiller.networks["student"])


@dataclass
class StopAt:
    """Looks like a ``SignalWatch`` that receives SIGTERM during a given step, counted from 1."""

    step: int
    distiller: Distiller | None = None

    @property
    def received(self) -> int:
        return int(signal.SIGTERM) if self.distiller.step_count >= self.step else 0


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def identical(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )
