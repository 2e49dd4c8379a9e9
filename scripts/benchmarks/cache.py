"""kdrun's step with the teacher's recorded logits beside the same step with the live teacher.

Block by block in alternating order; a live block beside the next one shows the noise.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import BATCH, CLASSES, PAIRS, OneBatch, TimedLoader, network_node, spread


def bench_cache(pair: str, rounds: int) -> None:
    """Step cost with recorded logits over that with the live teacher."""
    from kdrun.data.loader import AugmentationCycle
    from kdrun.distiller import Distiller, Optimization
    from kdrun.fit import fit, make_trainer
    from kdrun.forward import run_network
    from kdrun.interruption import SignalWatch
    from kdrun.logs import Console, TrainingLog
    from kdrun.methods.kd import KD
    from kdrun.models import build_model
    from kdrun.outputs import Batch, ModelOutput
    from kdrun.process import keep_freed_memory
    from kdrun.recording import Dense, Recording, describe, encode_views, write_augmentation
    from kdrun.tasks.classification import Classification

    keep_freed_memory()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    teacher_name, student_name, shape, steps = PAIRS[pair]
    task, method = Classification(num_classes=CLASSES), KD()
    method.supervised_loss = task.supervised_loss
    networks = []
    for name in (teacher_name, student_name):
        torch.manual_seed(0)
        node = network_node(name)
        networks.append(build_model(node, num_classes=CLASSES, input_shape=shape))
    teacher, student = networks[0].eval().requires_grad_(False), networks[1]
    torch.manual_seed(1)
    data = [(torch.randn(BATCH, *shape), torch.randint(CLASSES, (BATCH,))) for _ in range(steps)]
    loader = TimedLoader(data, lambda: 0.0, rounds)
    order = torch.randperm(steps * BATCH)  # As in training, rows are read in random order.
    for number, batch in enumerate(loader.batches):
        batch.index = order[number * BATCH : (number + 1) * BATCH]

    def live(batch: Batch) -> ModelOutput:
        with torch.no_grad():
            return run_network(task, teacher, batch)

    class TimedDistiller(Distiller):
        """Tells the loader when the last step of a block has been taken."""

        def training_step(self, block: Iterator[Batch], block_index: int) -> None:
            super().training_step(block, block_index)
            if self.position == steps:
                loader.finish()

    epochs = 2 * rounds + 3
    options = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    options |= {"precision": 32, "deterministic": False}
    with tempfile.TemporaryDirectory() as folder:
        encoding = Dense(torch.float16)
        arrays = [encode_views(encoding, live(b)) | {"index": b.index} for b in loader.batches]
        places = [slice(first, first + BATCH) for first in range(0, steps * BATCH, BATCH)]
        write_augmentation(Path(folder), 0, steps * BATCH, zip(places, arrays, strict=True))
        describe(Path(folder), {})
        cycle = AugmentationCycle(0, 1)
        recording = Recording(Path(folder), encoding, views=(), cycle=cycle, expected={})
        teachers = (live, recording)
        distiller = TimedDistiller(
            task=task,
            method=method,
            student=student,
            teachers={},
            stand_ins={"teacher": lambda batch: teachers[loader.epoch % 2](batch)},
            taps={},
            optimization=Optimization(
                optimizer=lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), scheduler=None
            ),
            epochs=epochs,
            steps_per_epoch=steps,
        )
        fit(
            distiller,
            loader,
            OneBatch(loader.batches[:1]),
            trainer=make_trainer(options, epochs=epochs),
            directory=Path(folder),
            key="bench",
            log=TrainingLog(Console("off"), "bench", BATCH),
            watch=SignalWatch(),
            checkpoint_seconds=1e9,
        )
    # The blocks ran as live, recorded, live, recorded, ..., live; the first two warmed up.
    lives, recorded = loader.seconds[2::2], loader.seconds[3::2]
    ratios = [ours / lives[n + n % 2] for n, ours in enumerate(recorded)]
    noise = [lives[n + 1 - n % 2] / lives[n + n % 2] for n in range(len(recorded))]
    base = statistics.median(lives) / steps * 1e3
    print(f"{pair}: live teacher {base:.3f} ms/step, {rounds} rounds of {steps} steps")
    print(f"  live again / live   {spread(noise)}")
    print(f"  recorded / live     {spread(ratios)}")
