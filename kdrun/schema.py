"""Types and ranges of every option that is not an argument of some class.

Options of methods, networks, data sets, tasks and stages are constructor arguments and are checked
against the constructors (``kdrun.checks``); the ones here are read by kdrun itself.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, Literal

from kdrun.catalogue import is_further_network
from kdrun.parameters import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    ProperFraction,
)


@dataclass
class Root:
    """The plain keys of ``conf/config.yaml``."""

    seed: NonNegativeInt
    data_seed: NonNegativeInt | None
    protocol: Literal["holdout", "paper"]
    output_dir: str
    members: list[str]
    members_at_once: PositiveInt | None
    rerun: bool
    dry: bool
    allow_packages: list[str]


@dataclass
class Teacher:
    """What ``teacher`` says besides the network's own arguments."""

    checkpoint: str | None
    finetune: bool
    weights: Literal["last", "best"]
    mode: Literal["eval", "batch_stats"]
    precision: Literal[32, "bf16"]
    fold: bool
    seed: NonNegativeInt
    allow_chance: bool
    allow_other_data: bool
    cache: Literal["none", "logits", "topk", "features"]
    cache_views: PositiveInt
    cache_seed: NonNegativeInt
    cache_top_k: PositiveInt
    cache_dtype: Literal["fp16", "fp32"]
    reads: str | None


@dataclass
class Student:
    """What ``student`` says besides the network's own arguments."""

    init_from: str | None
    allow_other_data: bool
    reads: str | None


@dataclass
class Scheduler:
    """The learning-rate schedule."""

    name: Literal["constant", "linear", "cosine", "multistep", "onecycle"]
    warmup_epochs: NonNegative
    milestones: list[Positive]
    gamma: Positive
    min_lr: NonNegative


@dataclass
class Optimizer:
    """Ranges that torch's optimisers leave to run time; which of these exist, the class says."""

    lr: Positive
    momentum: ProperFraction
    weight_decay: NonNegative
    dampening: Fraction
    eps: NonNegative


@dataclass
class TeacherTraining:
    """What the teacher's training does differently; null: the same."""

    epochs: PositiveInt | None
    batch_size: PositiveInt | None
    optimizer: dict | None
    scheduler: dict | None


@dataclass
class Training:
    """How networks are trained."""

    epochs: PositiveInt
    batch_size: PositiveInt
    optimizer: dict
    scheduler: dict
    clip_norm: Positive | None
    label_smoothing: ProperFraction
    ema: ProperFraction | None
    nonfinite: Literal["stop", "skip"]
    patience: PositiveInt | None
    ties: Literal["first", "last"]
    teacher: dict


@dataclass
class Recipe:
    """The stages of an experiment, in order."""

    stages: dict


@dataclass
class Trainer:
    """Where and how it is computed."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    devices: PositiveInt
    num_nodes: PositiveInt
    strategy: Literal["auto", "ddp", "fsdp"]
    precision: Literal[32, 64, "bf16"]
    accumulate: PositiveInt
    compile: bool
    channels_last: bool
    num_threads: PositiveInt | None
    deterministic: bool
    keep_last: PositiveInt
    progress: Literal["auto", "line", "plain", "off"]


@dataclass
class Logger:
    """Where metrics go besides ``metrics.csv``; the rest are arguments of the logger's class."""

    name: Literal["csv", "wandb", "tensorboard", "mlflow"]


SECTIONS: dict[str, type] = {
    "training": Training,
    "training.scheduler": Scheduler,
    "training.teacher": TeacherTraining,
    "training.teacher.scheduler": Scheduler,
    "recipe": Recipe,
    "trainer": Trainer,
}
"""Sections whose keys are exactly the fields of a dataclass, by their place in the config."""

BESIDE_ARGUMENTS: dict[str, type] = {
    "teacher": Teacher,
    "student": Student,
    "training.optimizer": Optimizer,
    "training.teacher.optimizer": Optimizer,
    "logger": Logger,
}
"""Sections that hold a class's constructor arguments beside the fields of a dataclass."""


def beside_arguments(place: str) -> type | None:
    """The dataclass whose fields stand beside a class's arguments at a place of the config.

    A further network has those of the teacher.
    """
    return BESIDE_ARGUMENTS.get("teacher" if is_further_network(place) else place)


def fields_of(schema: type) -> dict[str, Any]:
    """Names and annotations of a schema's fields."""
    return typing.get_type_hints(schema, include_extras=True)
