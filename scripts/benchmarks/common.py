"""What the benchmarks share: networks, the loop one would write by hand, blocks, spreads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

BATCH, CLASSES = 64, 100
PAIRS = {
    # teacher, student, input shape, steps in a block
    "mlp": ("mlp", "mlp", (3, 8, 8), 300),
    "resnet20-resnet8": ("resnet20", "resnet8", (3, 32, 32), 8),
    "resnet32x4-resnet8x4": ("resnet32x4", "resnet8x4", (3, 32, 32), 2),
}


def network_node(name: str) -> dict[str, Any]:
    """The config node of a shipped network; the two-layer one is an mlp with 64 hidden units."""
    from kdrun.catalogue import shipped

    if name == "mlp":
        return {"_target_": "kdrun.models.mlp.MLP", "hidden": [64]}
    return yaml.safe_load((shipped() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))


class BareLoop:
    """The loop one would write by hand."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self.teacher, self.student = teacher.eval().requires_grad_(False), student.train()
        self.optimizer = torch.optim.SGD(student.parameters(), lr=0.0, momentum=0.9)

    def run(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """One block of steps."""
        for x, y in batches:
            with torch.no_grad():
                t = self.teacher(x)
            s = self.student(x)
            ce = functional.cross_entropy(s, y)
            p = functional.log_softmax(t / 4.0, dim=1)
            q = functional.log_softmax(s / 4.0, dim=1)
            kd = functional.kl_div(q, p, reduction="batchmean", log_target=True) * 16.0
            loss = 0.1 * ce + 0.9 * kd
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()


class TimedLoader:
    """Feeds kdrun one block per epoch, and runs the bare blocks in between.

    CPU time of kdrun's block is taken from the request of its first batch to the end of its last
    step (``finish``); epochs, validation and checkpoints are not part of a step.
    """

    def __init__(
        self, batches: list[tuple[Tensor, Tensor]], bare: Callable[[], float], rounds: int
    ) -> None:
        from kdrun.outputs import Batch

        index = torch.arange(BATCH)
        self.batches = [Batch(x, y, index) for x, y in batches]
        self.bare, self.rounds = bare, rounds
        self.bare_seconds: list[tuple[float, float]] = []
        self.seconds: list[float] = []
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Note which round comes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator:
        first = self.bare()
        second = self.bare()
        self.bare_seconds.append((first, second))
        self._began = time.process_time()
        yield from self.batches

    def finish(self) -> None:
        """The last step of the block has been taken."""
        self.seconds.append(time.process_time() - self._began)


class OneBatch(list):
    """A validation loader of the batches it holds."""


def spread(values: list[float]) -> str:
    """``min - median - max``."""
    return f"{min(values):.3f} - {statistics.median(values):.3f} - {max(values):.3f}"
