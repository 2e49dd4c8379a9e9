"""A batch cut into parts, or divided among processes: the same loss and gradient for each method.

Batch normalisation, which looks at the samples of a batch together, is put out of play.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, multiprocessing, nn

from kdrun import distributed
from kdrun.build import instantiate
from kdrun.data.batches import Preprocessing
from kdrun.data.module import DataModule
from kdrun.data.tokens import TokenRows
from kdrun.distiller import Distiller
from kdrun.interruption import Stopped
from kdrun.method import Method
from kdrun.methods.kd import KD
from kdrun.tasks.language_modelling import LanguageModelling
from tests.tiny import (
    StopAt,
    Training,
    composed,
    digits,
    identical,
    sgd,
    small_cnn,
    state_of,
    task,
)

CONFIGS = sorted(Path(__file__).parents[2].joinpath("conf", "method").glob("*.yaml"))
NODES = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS}
BATCH = 64
LOCALLY = r"not look across ranks|batch of one process|[Ee]ach process|its own batch|a rank sees"
TOGETHER = r"gather|all ranks|all processes"
"""What a method that compares samples says about several processes."""
GATHERED = ("sinkhorn gather", "sinkhorn gather words text", "sinkhorn gather text")
CHANGED = {
    "sinkhorn gather": {"gather": True},
    "sinkhorn gather words text": {
        **{"gather": True, "points": "label_words", "label_words": [1, 2, 3]},
    },
    "sinkhorn gather text": {"gather": True, "tokens_at_most": 1000},
    "mst": {"masks": False},  # They are trained in a stage of their own.
    "gkd text": {"on_policy": 0.0},  # What the student writes is drawn.
}
"""Options that are not those of the configuration."""
OF_ONE_BATCH = {"ff_g2m"}
"""Methods for data sets of one batch that cannot be divided."""


def method_of(name: str) -> Method:
    node = {key: value for key, value in NODES[name.split()[0]].items() if key != "defaults"}
    return instantiate(node | CHANGED.get(name, {}))


def names_of(method: str) -> list[str]:
    """What is to be looked at of a method: on images, and on rows of text of unequal lengths."""
    made = method_of(method)
    on_text = "language_modelling" in made.tasks and not made.relational
    return [method] * ("classification" in made.tasks) + [f"{method} text"] * on_text


NAMES = [
    *(name for method in NODES if method not in OF_ONE_BATCH for name in names_of(method)),
    *GATHERED,
]


def on_text(name: str) -> bool:
    return name.endswith(" text")


def of_samples(name: str) -> bool:
    """Whether the loss is a mean over samples, or positions, that do not know of each other."""
    method = method_of(name)
    return not method.relational and (not method.ordered or name in CHANGED)


class StillNorm(nn.BatchNorm2d):
    """Batch normalisation that always uses its running statistics."""

    def train(self, mode: bool = True) -> StillNorm:
        return super().train(False)


VOCABULARY = 11


class Lines(DataModule):
    """Rows of 1 to 12 random tokens, filled up with what does not count."""

    task = "language_modelling"

    def __init__(self) -> None:
        super().__init__(val_fraction=0.0, preprocessing=Preprocessing())

    def load(self) -> dict[str, TokenRows]:
        self.class_names = [str(token) for token in range(VOCABULARY)]
        dice = torch.Generator().manual_seed(0)
        rows = {}
        for part, size in {"train": BATCH, "validation": 4, "test": 4}.items():
            tokens = torch.randint(VOCABULARY, (size, 13), generator=dice, dtype=torch.int32)
            lengths = torch.randint(2, 14, (size,), generator=dice)
            counted = torch.arange(13) < lengths[:, None]
            rows[part] = TokenRows(tokens, torch.arange(size), counted, lengths)
        return rows


@functools.cache
def lines() -> DataModule:
    data = Lines()
    data.prepare()
    return data


@functools.cache
def few_labels() -> DataModule:
    """The digits, of which a few have labels; batches are drawn from these."""
    data = instantiate(composed("dataset=digits_few_shot").values["dataset"])
    data.prepare()
    return data


def data_of(name: str) -> Callable[[], DataModule]:
    if on_text(name):
        return lines
    return few_labels if method_of(name).unlabelled else digits


def bigrams(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))


def network_of(seed: int) -> nn.Module:
    network = small_cnn(seed)
    dice = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=dice)
            module.running_var.uniform_(0.5, 1.5, generator=dice)
    return network


class StillTraining(Training):
    """A training in which no statistics of a batch are used, also not by what the method adds."""

    def start(self) -> Distiller:
        distiller = super().start()
        for module in distiller.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = StillNorm
                module.eval()
        return distiller


def one_step(name: str, directory: Path, accumulate: int = 1) -> dict[str, Any]:
    """Loss terms and gradients of the first step, and all buffers and weights after it."""
    gradients: list[Tensor] = []

    def noting(parameters: Any) -> torch.optim.Optimizer:
        optimizer = sgd(parameters)
        optimizer.register_step_pre_hook(
            lambda *_: gradients.extend(
                torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
            )
        )
        return optimizer

    roles = method_of(name).roles()
    make = bigrams if on_text(name) else network_of
    training = StillTraining(
        directory,
        student=lambda: make(1),
        method=lambda: method_of(name),
        teachers={role: (lambda n=number: make(n)) for number, role in enumerate(roles, 2)},
        data=data_of(name),
        task=LanguageModelling(num_classes=VOCABULARY) if on_text(name) else task(),
        optimizer=noting,
        accumulate=accumulate,
        batches=1,
        batch_size=BATCH,
        precision=64,
    )
    row = training.run().history[0]
    return {
        "terms": {key: value for key, value in row.items() if key.startswith("loss")},
        "gradients": gradients,
        "state": state_of(training.distiller.networks),
        "buffers": dict(training.distiller.method.named_buffers()),
    }


# -- one process ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    known: dict[tuple[str, int], dict[str, Any]] = {}

    def of(name: str, accumulate: int = 1) -> dict[str, Any]:
        if (name, accumulate) not in known:
            directory = tmp_path_factory.mktemp("alone")
            known[name, accumulate] = one_step(name, directory, accumulate)
        return known[name, accumulate]

    return of


def assert_same_step(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found["terms"] == pytest.approx(expected["terms"], rel=1e-6, abs=1e-9)
    assert len(found["gradients"]) == len(expected["gradients"]) > 0
    largest = max(float(gradient.abs().max()) for gradient in expected["gradients"])
    assert largest > 0
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        # Losses that are computed in single precision leave their rounding.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * largest)
    torch.testing.assert_close(found["buffers"], expected["buffers"], equal_nan=True)


@pytest.mark.parametrize("name", list(filter(of_samples, NAMES)))
def test_parts_of_a_batch(alone, name: str) -> None:
    assert_same_step(alone(name, 4), alone(name))


def test_every_method_is_looked_at() -> None:
    assert {name.split()[0] for name in NAMES} | OF_ONE_BATCH == set(NODES)
    assert all(method_of(name).needs for name in OF_ONE_BATCH)
    assert sum(map(of_samples, NAMES)) >= 20


# -- two processes --------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def one_rank(rank: int, port: int, folder: str) -> None:
    """Every method's first step, and a training that is stopped and continued."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    torch.set_num_threads(1)
    distributed.initialize()
    place = Path(folder)
    for name in NAMES:
        try:
            found = one_step(name, place / name)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, place / f"{name}.{rank}.pt")
    torch.save(stopped_and_continued(place), place / f"resumed.{rank}.pt")
    torch.distributed.destroy_process_group()


def stopped_and_continued(place: Path) -> dict[str, Any]:
    def training(name: str) -> Training:
        return Training(
            place / name,
            student=lambda: small_cnn(1),
            method=KD,
            teachers={"teacher": lambda: small_cnn(2)},
            epochs=2,
            ema_decay=0.9,
        )

    whole, again = training("whole"), training("again")
    expected = whole.run().history
    stops = []
    try:
        training("again").run(StopAt(20))
    except Stopped as stop:
        stops.append(stop.signal_number)
    found = again.run().history
    timing = ("seconds", "samples_per_second", "memory_mib")
    return {
        "stops": stops,
        "histories": [
            [{k: v for k, v in row.items() if k not in timing} for row in rows]
            for rows in (expected, found)
        ],
        "states": [state_of(each.distiller) for each in (whole, again)],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Both ranks' account of each method; two processes are started once for all."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(one_rank, args=(free_port(), str(folder)), nprocs=2)

    def of(name: str) -> list[dict[str, Any]]:
        found = [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)]
        for each in found:
            assert "error" not in each, each["error"]
        return found

    return of


def documentation(name: str) -> str:
    made = type(method_of(name))
    texts = (inspect.getdoc(sys.modules[made.__module__]), inspect.getdoc(made))
    return " ".join(" ".join(filter(None, texts)).split())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes(alone, ranks, name: str) -> None:
    first, second = ranks(name)
    for key in ("state", "buffers"):
        assert first[key].keys() == second[key].keys()
        for place, value in first[key].items():
            assert torch.equal(value, second[key][place]), f"the ranks disagree about {place}"
    if of_samples(name) or name in GATHERED:
        assert_same_step(first, alone(name))
        return
    if method_of(name).ordered:
        return  # Each rank draws its own random numbers.
    said = documentation(name)
    if re.search(LOCALLY, said):
        # A process compares the samples it has: the same as a batch cut into as many parts.
        assert_same_step(first, alone(name, 2))
    else:
        assert re.search(TOGETHER, said), "it does not say what it sees across ranks"
        assert_same_step(first, alone(name))


@pytest.mark.slow
def test_relations_across_ranks_make_a_difference(alone) -> None:
    """Else the test above could not tell the two kinds apart."""
    whole, parts = alone("sinkhorn"), alone("sinkhorn", 2)
    assert parts["terms"]["loss/sinkhorn"] != pytest.approx(whole["terms"]["loss/sinkhorn"], 1e-5)


@pytest.mark.slow
def test_several_processes_are_stopped_and_continued(ranks) -> None:
    for each in ranks("resumed"):
        assert each["stops"] == [signal.SIGTERM]
        whole, again = each["histories"]
        assert again == whole
    # Averages of running statistics, which only the first rank saves, may differ on the other.
    assert identical(*ranks("resumed")[0]["states"])
