"""Runs side by side: bit for bit those of one command each, also after an interruption."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdrun.catalogue import open_catalogue
from kdrun.errors import ConfigErrors, Interrupted, UserError
from kdrun.fit import _Session
from kdrun.interruption import SignalWatch
from kdrun.lockstep import Ended
from kdrun.members import MemberRun, group_of, groups, member_runs
from kdrun.method import Method
from kdrun.methods.kd import KD
from kdrun.side_by_side import check_methods, run_side_by_side
from kdrun.tasks.classification import Classification
from tests.tiny import WORDS, identical, run, tiny_config

COMMON = (
    *("teacher=small_cnn", "teacher.widths=[8,16,16]", "data_seed=3", "training.epochs=2"),
    *("training.batch_size=256", "student.widths=[4,8,8]", "teacher.allow_chance=true"),
    "dataset.augmentation.crop_padding=1",
)
MEMBERS = (
    "seed=0",
    "seed=1 method.temperature=8",
    "method=dkd seed=2 training.optimizer.lr=0.01 'training.teacher.optimizer={_target_: "
    "torch.optim.SGD, lr: 0.05, momentum: 0.9, weight_decay: 0.0005, nesterov: true}'",
    "method=fitnet seed=0",
    "method=rkd seed=1",
    "method=mlld seed=4",
    "student=mlp student.hidden=[16] student.dropout=0.3 seed=1",
)
"""Two temperatures, another learning rate, a projector, relations, a strong view, dropout."""
TIMES = ("seconds", "samples_per_second", "memory_mib")


def chosen(root: Path, members: Sequence[str], *more: str) -> list[MemberRun]:
    words = [*WORDS, f"output_dir={root}", *COMMON, *more]
    given = {word.partition("=")[0]: word for word in words}
    return member_runs(list(given.values()), members, open_catalogue())


def ran(runs: Sequence[MemberRun]) -> list[Ended]:
    return run_side_by_side(runs, [])


def trained(directory: str) -> dict[str, torch.Tensor]:
    """Everything that a training has left in numbers, but for times."""
    found = {}
    for name in ("student", "student_best", "predictions"):
        file = load_file(Path(directory, f"{name}.safetensors"))
        found |= {f"{name} {key}": value for key, value in file.items()}
    with Path(directory, "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            numbers = {k: v for k, v in row.items() if k not in TIMES}
            found[f"epoch {row['epoch']}"] = torch.tensor([float(v) for v in numbers.values()])
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of all members, each of a command of its own."""
    root = tmp_path_factory.mktemp("alone")
    results = {}
    for member in chosen(root, MEMBERS):
        results[member.label] = run(root, *member.words)[0]
    return results


def test_members_are_the_runs_that_they_would_be_alone(tmp_path: Path, alone) -> None:
    forwards = []
    ended = ran(chosen(tmp_path, MEMBERS))
    assert [end.error for end in ended] == [None] * len(MEMBERS)
    for label, end in zip(MEMBERS, ended, strict=True):
        assert identical(trained(end.result["directory"]), trained(alone[label]["directory"]))
        for name, network in end.result["networks"].items():
            for entry, value in network.items():
                if entry != "training":
                    assert value == alone[label]["networks"][name][entry]
    assert not forwards
