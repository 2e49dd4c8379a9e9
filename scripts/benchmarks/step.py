"""The cost of kdrun's step over a bare loop with the same networks, data and arithmetic.

Plain KD (T = 4, 0.1 CE + 0.9 KD, SGD with momentum, learning rate 0 so that every block does
identical arithmetic) in one process on one thread. A block of the bare loop stands right beside
each block of kdrun, in alternating order, and a second bare block beside the first shows the noise.
The allocator is fixed and denormals are flushed for all of them. Printed: ratios to the adjacent
bare block and extra CPU milliseconds per step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import (
    BATCH,
    CLASSES,
    PAIRS,
    BareLoop,
    OneBatch,
    TimedLoader,
    network_node,
    spread,
)


def bench_step(pair: str, rounds: int) -> None:
    """Time one pair of networks and print a line."""
    from kdrun.assembly import Assembly
    from kdrun.distiller import Distiller, Optimization
    from kdrun.fit import fit, make_trainer
    from kdrun.interruption import SignalWatch
    from kdrun.logs import Console, TrainingLog
    from kdrun.methods.kd import KD
    from kdrun.models import build_model
    from kdrun.outputs import Batch
    from kdrun.process import keep_freed_memory
    from kdrun.tasks.classification import Classification

    keep_freed_memory()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    teacher_name, student_name, shape, steps = PAIRS[pair]

    def network(name: str) -> nn.Module:
        torch.manual_seed(0)
        return build_model(network_node(name), num_classes=CLASSES, input_shape=shape)

    torch.manual_seed(1)
    data = [(torch.randn(BATCH, *shape), torch.randint(CLASSES, (BATCH,))) for _ in range(steps)]
    loop = BareLoop(network(teacher_name), network(student_name))

    def bare() -> float:
        began = time.process_time()
        loop.run(data)
        return time.process_time() - began

    task = Classification(num_classes=CLASSES)
    assembly = Assembly(KD(), network(student_name), {"teacher": network(teacher_name)})
    assembly.method.supervised_loss = task.supervised_loss
    loader = TimedLoader(data, bare, rounds)

    class TimedDistiller(Distiller):
        """Tells the loader when the last step of a block has been taken."""

        def training_step(self, block: Iterator[Batch], block_index: int) -> None:
            super().training_step(block, block_index)
            if self.position == steps:
                loader.finish()

    distiller = TimedDistiller(
        task=task,
        method=assembly.method,
        student=assembly.student,
        teachers=assembly.teachers,
        taps={},
        optimization=Optimization(
            optimizer=lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
            scheduler=None,
        ),
        epochs=rounds + 1,
        steps_per_epoch=steps,
    )
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": 32,
        "deterministic": False,
    }
    trainer = make_trainer(options, epochs=rounds + 1)
    validation = OneBatch(loader.batches[:1])
    with tempfile.TemporaryDirectory() as folder:
        fit(
            distiller,
            loader,
            validation,
            trainer=trainer,
            directory=Path(folder),
            key="bench",
            log=TrainingLog(Console("off"), "bench", BATCH),
            watch=SignalWatch(),
            checkpoint_seconds=1e9,
        )
    # The blocks ran as bare, bare, kdrun, bare, bare, kdrun ...; the first round warmed up.
    # Beside kdrun stands the bare block before it or the one after it, in turn, and the noise is
    # taken in alternating order too, so that a drift of the machine's speed cancels.
    bare_blocks = [*loader.bare_seconds[1:], (bare(), bare())]
    rows = []
    for number, ours in enumerate(loader.seconds[1:]):
        neighbours = (bare_blocks[number][1], bare_blocks[number + 1][0])
        pair_of_bare = bare_blocks[number] if number % 2 else bare_blocks[number][::-1]
        rows.append((ours, neighbours[number % 2], *pair_of_bare))
    beside = [ours / theirs for ours, theirs, _, _ in rows]
    noise = [again / first for _, _, again, first in rows]
    extra = [1e3 * (ours - theirs) / steps for ours, theirs, _, _ in rows]
    extra_noise = [1e3 * (again - first) / steps for _, _, again, first in rows]
    base = statistics.median(theirs for _, theirs, _, _ in rows) / steps * 1e3
    print(f"{pair}: bare {base:.3f} ms/step, {rounds} rounds of {steps} steps")
    print(f"  bare again / bare   {spread(noise)}   extra ms {spread(extra_noise)}")
    print(f"  kdrun / bare        {spread(beside)}   extra ms {spread(extra)}")
