"""A batch cut into parts, or divided among processes: the same loss and gradient for each method.

Batch normalisation, which looks at the samples of a batch together, is put out of play.
"""

from __future__ import annotations

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
from kdrun.distiller import Distiller
from kdrun.interruption import Stopped
from kdrun.method import Method
from kdrun.methods.kd import KD
from tests.tiny import StopAt, Training, identical, sgd, small_cnn, state_of

CONFIGS = sorted(Path(__file__).parents[2].joinpath("conf", "method").glob("*.yaml"))
NODES = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS}
BATCH = 64
LOCALLY = r"not look across ranks|batch of one process|[Ee]ach process|its own batch"
TOGETHER = r"gather|all ranks|all processes"
"""What a method that compares samples says about several processes."""
GATHERED = "sinkhorn gather"


def method_of(name: str) -> Method:
    node = {key: value for key, value in NODES[name.split()[0]].items() if key != "defaults"}
    return instantiate(node | ({"gather": True} if name == GATHERED else {}))


def runs_on_digits(name: str) -> bool:
    """Whether a method is made for labelled images and needs no further data or networks."""
    method = method_of(name)
    sources = set(method.roles().values())
    return (
        "classification" in method.tasks
        and sources <= {"teacher", "student"}
        and not (method.unlabelled or method.needs)
    )


NAMES = [name for name in [*NODES, GATHERED] if runs_on_digits(name)]


class StillNorm(nn.BatchNorm2d):
    """Batch normalisation that always uses its running statistics."""

    def train(self, mode: bool = True) -> StillNorm:
        return super().train(False)


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
    training = StillTraining(
        directory,
        student=lambda: network_of(1),
        method=lambda: method_of(name),
        teachers={role: (lambda n=number: network_of(n)) for number, role in enumerate(roles, 2)},
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


def of_samples(name: str) -> bool:
    method = method_of(name)
    return not (method.relational or method.ordered)


@pytest.mark.parametrize("name", list(filter(of_samples, NAMES)))
def test_parts_of_a_batch(alone, name: str) -> None:
    assert_same_step(alone(name, 4), alone(name))


def test_most_methods_are_looked_at() -> None:
    assert len(NAMES) >= 20
    assert sum(map(of_samples, NAMES)) >= 12


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
    text = inspect.getdoc(sys.modules[type(method_of(name)).__module__]) or ""
    return " ".join(text.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes(alone, ranks, name: str) -> None:
    first, second = ranks(name)
    for key in ("state", "buffers"):
        assert first[key].keys() == second[key].keys()
        for place, value in first[key].items():
            assert torch.equal(value, second[key][place]), f"the ranks disagree about {place}"
    method = method_of(name)
    if method.ordered:
        return  # Each rank draws its own random numbers.
    said = documentation(name)
    if not method.relational or name == GATHERED:
        assert_same_step(first, alone(name))
    elif re.search(LOCALLY, said):
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
