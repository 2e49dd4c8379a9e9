"""A whole process: one epoch of 640 images of ten classes, resnet32 -> resnet20, start to end.

kdrun and ``scripts/plain_kd.py --report`` read the same folder of PNG files, evaluate a given
teacher, train one epoch, evaluate on 100 test images, write checkpoints, and compare teacher, last
and best student. kdrun's recipe is cut to these stages (no student alone for reference). Pairs of
processes in alternating order, on one thread; the images are made of random numbers. A third
process is kdrun with the levers that compute the same function: channels-last memory, and batch
normalisation folded into the teacher's convolutions.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import network_node, spread
from benchmarks.epoch import PLAIN, run

CLASSES, TRAIN_PER_CLASS, TEST_PER_CLASS = 10, 64, 10


PLAIN_SCRIPT, KDRUN, LEVERS = "plain script", "kdrun", "kdrun, channels_last and folded teacher"


def bench_process(rounds: int) -> None:
    """Wall and CPU time of the processes, ``rounds`` times."""
    found: dict[str, list[tuple[float, float]]] = {PLAIN_SCRIPT: [], KDRUN: [], LEVERS: []}
    with tempfile.TemporaryDirectory() as name:
        commands = process_commands(Path(name))
        for number in range(rounds + 1):  # The first round fills the disk's cache.
            for title in list(found) if number % 2 else list(found)[::-1]:
                with tempfile.TemporaryDirectory() as place:
                    spent = timed(commands[title], Path(place))
                if number:
                    found[title].append(spent)
    print(f"one epoch of {CLASSES * TRAIN_PER_CLASS} images, {rounds} rounds of processes")
    for title, rows in found.items():
        wall, used = zip(*rows, strict=True)
        plain_wall, plain_used = zip(*found[PLAIN_SCRIPT], strict=True)
        print(f"  {title}: {spread(list(wall))} s")
        if title != PLAIN_SCRIPT:
            print(f"    wall over plain {spread(ratios(wall, plain_wall))}")
            print(f"    CPU over plain  {spread(ratios(used, plain_used))}")


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each pair."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def process_commands(folder: Path) -> dict[str, list[str]]:
    """The command of each process; what they read is written to ``folder``."""
    write_images(folder / "images")
    weights = teacher_weights(folder)
    kdrun = [str(Path(sys.executable).with_name("kdrun")), "dataset=image_folder"]
    kdrun += [f"dataset.name={folder / 'images'}", "dataset.storage=resident"]
    kdrun += ["dataset.image_size=null", "dataset.resize=null", "dataset.crop_scale=null"]
    kdrun += ["dataset.augmentation.crop_padding=4", "dataset.cache=false", "protocol=paper"]
    kdrun += ["teacher=resnet32", f"teacher.checkpoint={weights}", "student=resnet20"]
    kdrun += ["teacher.allow_chance=true", "method=kd", "recipe.stages.alone=null"]
    kdrun += ["training=cifar240", "training.epochs=1", "trainer.accelerator=cpu"]
    kdrun += ["training.scheduler.name=constant"]
    plain = [sys.executable, str(PLAIN), "--images", str(folder / "images"), "--report"]
    plain += ["--teacher", "resnet32", "--teacher-weights", str(weights)]
    plain += ["--student", "resnet20", "--save", str(folder / "plain.pt")]
    levers = [*kdrun, "trainer.channels_last=true", "teacher.fold=true"]
    return {PLAIN_SCRIPT: plain, KDRUN: kdrun, LEVERS: levers}


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    before, began = os.times(), time.perf_counter()
    run(command, folder)
    wall, after = time.perf_counter() - began, os.times()
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def write_images(folder: Path) -> None:
    """``train`` and ``test`` with a folder of PNG files for each class."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
        for label in range(CLASSES):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


def teacher_weights(folder: Path) -> Path:
    """Weights of a resnet32 for ten classes."""
    import torch

    from kdrun.checkpoints import save_weights
    from kdrun.models import build_model

    torch.manual_seed(0)
    network = build_model(network_node("resnet32"), num_classes=CLASSES, input_shape=(3, 32, 32))
    save_weights(network, folder / "teacher.safetensors")
    return folder / "teacher.safetensors"
