"""Several students on one teacher pass beside as many runs one by one.

The same trainings, each with a trainer of its own, take a block of steps one after the other, every
one with the live teacher, and the next block side by side, in turn. CPU time on one thread, from
the request of a block's first batch to the end of its last step; epochs, validation and checkpoints
are no part of it. A block one by one beside the next one shows the noise.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import BATCH, CLASSES, PAIRS, OneBatch, network_node, spread


class Stopwatch:
    """CPU seconds by epoch, taken while it runs."""

    def __init__(self) -> None:
        self.seconds: Counter[int] = Counter()
        self._began: float | None = None

    def start(self) -> None:
        """Go on, if it does not run yet."""
        if self._began is None:
            self._began = time.process_time()

    def stop(self, epoch: int) -> None:
        """Stand still and count for an epoch what has passed."""
        self.seconds[epoch] += time.process_time() - self._began
        self._began = None


def bench_members(pair: str, count: int, rounds: int) -> None:
    """Cost of steps side by side over that of the same steps one by one."""
    from kdrun.distiller import Distiller, Optimization
    from kdrun.fit import fit, make_trainer
    from kdrun.forward import run_network
    from kdrun.interruption import SignalWatch
    from kdrun.lockstep import Lockstep, Member
    from kdrun.logs import Console, TrainingLog
    from kdrun.methods.kd import KD
    from kdrun.models import build_model
    from kdrun.outputs import Batch, ModelOutput
    from kdrun.process import keep_freed_memory, use_one_arena
    from kdrun.shared_pass import FollowingLoader, SharedPass
    from kdrun.tasks.classification import Classification

    keep_freed_memory()
    use_one_arena()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    teacher_name, student_name, shape, steps = PAIRS[pair]
    task = Classification(num_classes=CLASSES)

    def network(name: str, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build_model(network_node(name), num_classes=CLASSES, input_shape=shape)

    torch.manual_seed(1)
    batches = [
        Batch(torch.randn(BATCH, *shape), torch.randint(CLASSES, (BATCH,)), torch.arange(BATCH))
        for _ in range(steps)
    ]
    teacher = network(teacher_name, 0).eval().requires_grad_(False)
    stopwatch, epochs = Stopwatch(), 2 * rounds + 3
    options = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    options |= {"precision": 32, "deterministic": False}

    class Data(list[Batch]):
        """A loader of the same batches in every epoch."""

        def set_epoch(self, epoch: int, start: int = 0) -> None:
            """Nothing to choose."""

    shared = SharedPass(lambda views: Data(batches))

    class InTurn(FollowingLoader):
        """The batches of an even epoch at once, those of an odd one side by side."""

        def __iter__(self) -> Iterator[Batch]:
            together = self._epoch % 2
            if not together:
                self.member.stand_aside(self._epoch, 0)
            for batch in super().__iter__() if together else batches:
                stopwatch.start()
                yield batch

    class TimedDistiller(Distiller):
        """Tells the stopwatch when the last step of a block has been taken."""

        def training_step(self, block: Iterator[Batch], block_index: int) -> None:
            super().training_step(block, block_index)
            if self.position == steps:
                stopwatch.stop(self.epoch)

    def train(member: Member) -> None:
        member.enter_stage(0)
        method = KD()
        method.supervised_loss = task.supervised_loss
        beside = shared.network("teacher", teacher, task).stand_in(None, ())
        loader = InTurn(member, shared, Data(batches))

        def speak(batch: Batch) -> ModelOutput:
            if loader._epoch % 2:
                return beside(batch)
            with torch.no_grad():
                return run_network(task, teacher, batch)

        distiller = TimedDistiller(
            task=task,
            method=method,
            student=network(student_name, int(member.label)),
            teachers={},
            stand_ins={"teacher": speak},
            taps={},
            optimization=Optimization(
                optimizer=lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), scheduler=None
            ),
            epochs=epochs,
            steps_per_epoch=steps,
        )
        with tempfile.TemporaryDirectory() as folder:
            fit(
                distiller,
                loader,
                OneBatch(batches[:1]),
                trainer=make_trainer(options, epochs=epochs),
                directory=Path(folder),
                key="bench",
                log=TrainingLog(Console("off"), "bench", BATCH),
                watch=SignalWatch(),
                checkpoint_seconds=1e9,
            )

    for ended in Lockstep([str(number) for number in range(count)]).run(train):
        if ended.error is not None:
            raise ended.error
    # The blocks ran as alone, together, alone, together, ..., alone; the first two warmed up.
    alone = [stopwatch.seconds[epoch] for epoch in range(2, epochs, 2)]
    together = [stopwatch.seconds[epoch] for epoch in range(3, epochs, 2)]
    ratios = [ours / alone[n + n % 2] for n, ours in enumerate(together)]
    noise = [alone[n + 1 - n % 2] / alone[n + n % 2] for n in range(len(together))]
    base = statistics.median(alone) / steps / count * 1e3
    print(f"{pair}: one by one {base:.3f} ms/step, {count} runs, {rounds} rounds of {steps} steps")
    print(f"  one by one again / one by one   {spread(noise)}")
    print(f"  side by side / one by one       {spread(ratios)}")
