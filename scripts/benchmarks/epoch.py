"""An epoch of CIFAR-100 distillation with kdrun, lever by lever, over that of a plain script.

``scripts/plain_kd.py`` is the plain script: per-image PIL transforms in a DataLoader, fp32,
contiguous. Every epoch runs in a process of its own on one thread, training images (of the first
ten classes), batch size, networks and objective the same; timed is the epoch (training, and
evaluation on 1,000 test images), not the start of the process or the decoding of the data set. Each
lever is added to those before it. Also printed: the accuracy after the epoch; it tells a lever that
breaks training from one that does not, no more.

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


def bench_epoch(pair: str, per_class: int, rounds: int, teacher: str | None) -> None:
    """Time ``rounds`` epochs of the plain script and of every set of levers, in turn."""
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
        for number in range(rounds + 1):  # The first round fills caches and is not counted.
            for title in list(rows) if number % 2 else list(rows)[::-1]:
                if title == "plain script":
                    row = plain_epoch(pair, arrays, weights, Path(folder))
                else:
                    row = our_epoch(pair, per_class, weights, settings[title], Path(folder))
                if number:
                    rows[title].append(row)
    plain = [seconds for seconds, _ in rows["plain script"]]
    print(f"{pair}, {CLASSES * per_class:,} images, {rounds} rounds; one thread")
    for title, found in rows.items():
        seconds = [s for s, _ in found]
        ratios = [p / s for p, s in zip(plain, seconds, strict=True)]
        accuracy = found[-1][1]
        print(f"  {title:34} {spread(seconds)} s  {spread(ratios)} x  accuracy {accuracy:.2f}")


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


def plain_epoch(pair: str, arrays: Path, weights: Path, folder: Path) -> tuple[float, float]:
    """Seconds and accuracy of one epoch of the plain script."""
    teacher, student = pair.split("-")
    command = [sys.executable, str(PLAIN), "--arrays", str(arrays)]
    command += ["--teacher", teacher, "--student", student, "--teacher-weights", str(weights)]
    command += ["--save", str(folder / "plain.pt")]
    told = json.loads(run(command, folder).splitlines()[-1])
    return told["seconds"][0], told["accuracy"][0]


def our_epoch(
    pair: str, per_class: int, weights: Path, words: list[str], folder: Path
) -> tuple[float, float]:
    """Seconds and accuracy of one epoch of the distillation in a kdrun process."""
    teacher, student = pair.split("-")
    command = [str(Path(sys.executable).with_name("kdrun")), *data_words(per_class)]
    command += [f"teacher={teacher}", f"student={student}", f"teacher.checkpoint={weights}"]
    command += ["teacher.allow_chance=true", "method=kd", "training.epochs=1", "rerun=true"]
    command += ["recipe.stages.alone=null"]
    command += ["training.scheduler.name=constant", "trainer.accelerator=cpu", *words]
    printed = run(command, folder)
    with Path(folder, printed.splitlines()[-1], "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    return float(row["seconds"]), float(row["validation/accuracy"])


def run(command: list[str], folder: Path) -> str:
    """What a command prints; on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
