"""An epoch of CIFAR-100 distillation with kdrun, lever by lever, over that of a plain script.

``scripts/plain_kd.py`` is the plain script: per-image PIL transforms in a DataLoader, fp32,
contiguous. Every training runs in a process of its own on one thread, training images (of the first
ten classes), batch size, networks and objective the same; timed are the epochs (training, and
evaluation on 1,000 test images), not the start of the process or the decoding of the data set. Each
lever is added to those before it. Also printed: the accuracy after the last epoch; with a trained
teacher (``--teacher``), some epochs and a few rounds, each of a seed of its own, it tells whether
the levers train as well as the plain script.

Needs CIFAR-100 where kdrun finds it (``KDRUN_DATA``, or the hub).
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import spread

CLASSES = 10
LEVERS = {
    "kdrun: resident data, kept memory": [],
    "+ channels_last": ["trainer.channels_last=true"],
    "+ folded teacher": ["teacher.fold=true"],
    "+ bf16 teacher": ["teacher.precision=bf16"],
}
PLAIN = Path(__file__).parents[1] / "plain_kd.py"


def bench_epoch(
    pair: str, per_class: int, rounds: int, teacher: str | None, epochs: int = 1
) -> None:
    """Time ``rounds`` trainings by the plain script and by every set of levers, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder, "images.npz")
        np.savez(arrays, **cifar100(per_class))
        weights = Path(teacher).resolve() if teacher else untrained_teacher(pair, Path(folder))
        settings: dict[str, list[str]] = {}
        words: list[str] = []
        for title, added in LEVERS.items():
            settings[title] = words = [*words, *added]
        rows: dict[str, list[tuple[float, float]]] = {"plain script": []}
        rows |= {title: [] for title in settings}
        # The first round fills caches and is not counted; many epochs outweigh that.
        for number in range(0 if epochs == 1 else 1, rounds + 1):
            for title in list(rows) if number % 2 else list(rows)[::-1]:
                if title == "plain script":
                    row = plain_epoch(pair, arrays, weights, Path(folder), epochs, number)
                else:
                    own = [*data_words(per_class), *settings[title], f"seed={number}"]
                    row = our_epoch(pair, own, weights, Path(folder), epochs)
                if number:
                    rows[title].append(row)
    plain = [seconds for seconds, _ in rows["plain script"]]
    print(f"{pair}, {CLASSES * per_class:,} images, {rounds} rounds; one thread; seconds an epoch")
    for title, found in rows.items():
        seconds = [s for s, _ in found]
        ratios = [p / s for p, s in zip(plain, seconds, strict=True)]
        reached = np.array([accuracy for _, accuracy in found])
        accuracy = f"accuracy {reached.mean():.2f} +- {reached.std(ddof=min(1, rounds - 1)):.2f}"
        print(f"  {title:34} {spread(seconds)} s  {spread(ratios)} x  {accuracy}")


def cifar100(per_class: int) -> dict[str, np.ndarray]:
    """The images that the run will train and be validated on, as arrays."""
    from kdrun.build import instantiate
    from kdrun.catalogue import open_catalogue
    from kdrun.config import compose

    words = [*data_words(per_class), "teacher=resnet20", "student=resnet8"]
    data = instantiate(dict(compose(words, open_catalogue()).values["dataset"]))
    data.prepare("paper")
    train, test = data._parts["train"], data._parts["test"]
    return {
        "train_images": train.inputs.permute(0, 2, 3, 1).contiguous().numpy(),
        "train_labels": train.target.numpy(),
        "test_images": test.inputs.permute(0, 2, 3, 1).contiguous().numpy(),
        "test_labels": test.target.numpy(),
    }


def data_words(per_class: int) -> list[str]:
    """The data set on kdrun's command line; validation is the test set, as papers have it."""
    words = ["dataset=cifar100", f"dataset.classes={CLASSES}", f"dataset.per_class={per_class}"]
    return [*words, "protocol=paper"]


def untrained_teacher(pair: str, folder: Path) -> Path:
    """Weights of a teacher that knows nothing; it costs what a trained one costs."""
    import torch

    from benchmarks.common import network_node
    from kdrun.checkpoints import save_weights
    from kdrun.models import build_model

    torch.manual_seed(0)
    node = network_node(pair.split("-")[0])
    network = build_model(node, num_classes=CLASSES, input_shape=(3, 32, 32))
    save_weights(network, folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


def plain_epoch(
    pair: str, arrays: Path, weights: Path, folder: Path, epochs: int, seed: int
) -> tuple[float, float]:
    """Seconds an epoch of the plain script, and its accuracy after the last."""
    teacher, student = pair.split("-")
    command = [sys.executable, str(PLAIN), "--arrays", str(arrays), "--seed", str(seed)]
    command += ["--teacher", teacher, "--student", student, "--teacher-weights", str(weights)]
    command += ["--save", str(folder / "plain.pt"), "--epochs", str(epochs)]
    told = json.loads(run(command, folder).splitlines()[-1])
    return sum(told["seconds"]) / epochs, told["accuracy"][-1]


def our_epoch(
    pair: str, words: list[str], weights: Path, folder: Path, epochs: int
) -> tuple[float, float]:
    """Seconds an epoch of the distillation in a kdrun process, and its accuracy after the last."""
    teacher, student = pair.split("-")
    command = [str(Path(sys.executable).with_name("kdrun")), *words]
    command += [f"teacher={teacher}", f"student={student}", f"teacher.checkpoint={weights}"]
    command += ["teacher.allow_chance=true", "method=kd", f"training.epochs={epochs}"]
    command += ["recipe.stages.alone=null", "rerun=true"]
    command += ["training.scheduler.name=constant", "trainer.accelerator=cpu"]
    printed = run(command, folder)
    with Path(folder, printed.splitlines()[-1], "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    seconds = sum(float(row["seconds"]) for row in rows) / epochs
    return seconds, float(rows[-1]["validation/accuracy"])


def run(command: list[str], folder: Path) -> str:
    """What a command prints; on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
