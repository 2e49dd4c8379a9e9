"""What kdrun's step costs over a bare PyTorch loop with the same networks, data and arithmetic.

    python scripts/bench.py step [--pair mlp|resnet20-resnet8|resnet32x4-resnet8x4] [--rounds 15]
    python scripts/bench.py startup [--runs 5]
    python scripts/bench.py allocator [--rounds 7]
    python scripts/bench.py data [--rounds 9]
    python scripts/bench.py cache [--pair resnet20-resnet8] [--rounds 15]

``step`` runs plain KD (T = 4, 0.1 CE + 0.9 KD, SGD with momentum, learning rate 0 so that every
block does identical arithmetic) in one process on one thread. A block of the bare loop stands right
beside each block of kdrun, in alternating order, and a second bare block beside the first shows the
noise. The allocator is fixed and denormals are flushed for all of them. Printed: ratios to the
adjacent bare block and extra CPU milliseconds per step, as min - median - max over the rounds.

``startup`` times whole commands: the seconds until help, an error, and the first training step.

``allocator`` pairs processes that run the bare resnet20 -> resnet8 loop with and without the
setting that ``kdrun.process.keep_freed_memory`` makes, in alternating order.

``data`` compares images per second of the resident loader (padded random crop, flip, normalise on
whole batches of 32x32 images) with the common way: an array, PIL and torchvision's transforms per
image, batches stacked in the same process.

``cache`` runs kdrun's step with the teacher's recorded logits beside the same step with the live
teacher, block by block in alternating order; a live block beside the next one shows the noise.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    validation = _OneBatch(loader.batches[:1])
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


class _OneBatch(list):
    """A validation loader of the batches it holds."""


def spread(values: list[float]) -> str:
    """``min - median - max``."""
    return f"{min(values):.3f} - {statistics.median(values):.3f} - {max(values):.3f}"


def bench_startup(runs: int) -> None:
    """Time whole commands in a fresh folder each."""
    commands = {
        "kdrun --help": ["--help"],
        "kdrun ls methods": ["ls", "methods"],
        "kdrun method.temprature=2 (an error)": ["method.temprature=2"],
        "kdrun dry=true teacher=mlp student=mlp": ["dry=true", "teacher=mlp", "student=mlp"],
    }
    program = [str(Path(sys.executable).with_name("kdrun"))]
    for title, words in commands.items():
        seconds = []
        for _ in range(runs + 1):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                subprocess.run([*program, *words], cwd=folder, capture_output=True, check=False)
                seconds.append(time.perf_counter() - began)
        print(f"{title}: {spread(seconds[1:])} s")
    first_steps = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            first_steps.append(_seconds_to_first_epoch(program, folder))
    print(f"first epoch line of a digits run (teacher=mlp): {spread(first_steps)} s")


def _seconds_to_first_epoch(program: list[str], folder: str) -> float:
    began = time.perf_counter()
    words = ["teacher=mlp", "student=mlp", "training.epochs=1", "trainer.progress=plain"]
    process = subprocess.Popen(
        [*program, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    seconds = float("nan")
    for line in process.stdout:
        if "epoch 1/" in line:
            seconds = time.perf_counter() - began
            break
    process.kill()
    process.wait()
    return seconds


def bench_allocator(rounds: int) -> None:
    """CPU time and page faults of the bare loop, with the allocator's setting over without."""
    ratios, faults = [], {"yes": [], "no": []}
    for number in range(rounds):
        order = ("yes", "no") if number % 2 else ("no", "yes")
        seconds = {}
        for keep in order:
            command = [sys.executable, __file__, "allocator-child", "--keep", keep]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            used, faulted = done.stdout.split()
            seconds[keep] = float(used)
            faults[keep].append(int(faulted))
        ratios.append(seconds["yes"] / seconds["no"])
    print(f"resnet20 -> resnet8, CPU time with / without: {spread(ratios)} ({rounds} pairs)")
    for keep, counts in faults.items():
        print(f"  page faults per step, kept={keep}: {spread([count / 1.0 for count in counts])}")


def allocator_child(keep: bool, steps: int = 12) -> None:
    """One process of ``bench_allocator``: prints CPU seconds and page faults per step."""
    from kdrun.models import build_model
    from kdrun.process import keep_freed_memory

    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    networks = [
        build_model(network_node(name), num_classes=CLASSES, input_shape=(3, 32, 32))
        for name in ("resnet20", "resnet8")
    ]
    loop = BareLoop(*networks)
    data = [(torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,)))]
    loop.run(data * 3)
    began, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loop.run(data * steps)
    used = time.process_time() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(used, faults // steps)


def bench_data(rounds: int, images: int = 3200) -> None:
    """Images per second on one thread, resident over per-image transforms."""
    from PIL import Image
    from torchvision import transforms

    from kdrun.data.augment import Augmentation
    from kdrun.data.batches import Preprocessing
    from kdrun.data.loader import LoaderOptions
    from kdrun.data.normalise import Normalisation
    from kdrun.data.resident import Samples

    torch.set_num_threads(1)
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    target = torch.randint(CLASSES, (images,), generator=generator)
    array = pixels.permute(0, 2, 3, 1).numpy()
    change = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

    def per_image() -> None:
        for first in range(0, images, BATCH):
            torch.stack([change(Image.fromarray(item)) for item in array[first : first + BATCH]])

    preprocessing = Preprocessing(
        normalisation=Normalisation(mean, std),
        augmentation=Augmentation(crop_padding=4, flip=0.5),
        num_classes=CLASSES,
    )
    options = LoaderOptions(batch_size=BATCH, shuffle=True, augment=True)
    loader = Samples(pixels, target, torch.arange(images)).serve(options, preprocessing)

    def resident() -> None:
        for _ in loader:
            pass

    def speed(run: Callable[[], None]) -> float:
        began = time.process_time()
        run()
        return images / (time.process_time() - began)

    rows = []
    for number in range(rounds + 1):
        loader.set_epoch(number)
        if number % 2:
            fast, slow = speed(resident), speed(per_image)
        else:
            slow, fast = speed(per_image), speed(resident)
        rows.append((fast, slow))
    rows = rows[1:]
    print(f"resident  {spread([fast for fast, _ in rows])} images/s")
    print(f"per image {spread([slow for _, slow in rows])} images/s")
    print(f"ratio     {spread([fast / slow for fast, slow in rows])} ({rounds} rounds)")


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
            _OneBatch(loader.batches[:1]),
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


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="overhead of a training step")
    step.add_argument("--pair", choices=PAIRS, default=None, help="all if left out")
    step.add_argument("--rounds", type=int, default=15)
    startup = commands.add_parser("startup", help="seconds to help, an error, the first step")
    startup.add_argument("--runs", type=int, default=5)
    allocator = commands.add_parser("allocator", help="what keeping freed memory gains")
    allocator.add_argument("--rounds", type=int, default=7)
    data = commands.add_parser("data", help="images per second of the data path")
    data.add_argument("--rounds", type=int, default=9)
    cache = commands.add_parser("cache", help="recorded logits in place of the live teacher")
    cache.add_argument("--pair", choices=PAIRS, default="resnet20-resnet8")
    cache.add_argument("--rounds", type=int, default=15)
    child = commands.add_parser("allocator-child")
    child.add_argument("--keep", choices=("yes", "no"), required=True)
    options = parser.parse_args()
    if options.command == "cache":
        bench_cache(options.pair, options.rounds)
        return
    if options.command == "allocator":
        bench_allocator(options.rounds)
        return
    if options.command == "data":
        bench_data(options.rounds)
        return
    if options.command == "allocator-child":
        allocator_child(options.keep == "yes")
        return
    if options.command == "startup":
        bench_startup(options.runs)
        return
    for pair in [options.pair] if options.pair else PAIRS:
        bench_step(pair, options.rounds)


if __name__ == "__main__":
    main()
