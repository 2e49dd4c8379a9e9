"""A whole process: one epoch of 640 images of ten classes, resnet32 -> resnet20, start to end.

kdrun and ``scripts/plain_kd.py`` read the same folder of PNG files, train one epoch with a given
teacher, evaluate on 100 test images and write their checkpoints. kdrun's recipe is cut to these
stages (no student alone for reference). Pairs of processes in alternating order, on one thread; the
images are made of random numbers.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import network_node, spread
from benchmarks.epoch import PLAIN, run

CLASSES, TRAIN_PER_CLASS, TEST_PER_CLASS = 10, 64, 10


def bench_process(rounds: int) -> None:
    """Wall and CPU time of both processes, ``rounds`` times."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
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
        plain = [sys.executable, str(PLAIN), "--images", str(folder / "images")]
        plain += ["--teacher", "resnet32", "--teacher-weights", str(weights)]
        plain += ["--student", "resnet20", "--save", str(folder / "plain.pt")]
        for number in range(rounds + 1):  # The first round fills the disk's cache.
            found = {}
            for title in ("kdrun", "plain") if number % 2 else ("plain", "kdrun"):
                with tempfile.TemporaryDirectory() as place:
                    found[title] = timed(kdrun if title == "kdrun" else plain, Path(place))
            if number:
                rows.append((*found["kdrun"], *found["plain"]))
    print(f"one epoch of {CLASSES * TRAIN_PER_CLASS} images, {rounds} pairs of processes")
    print(f"  kdrun        {spread([wall for wall, *_ in rows])} s")
    print(f"  plain script {spread([wall for _, _, wall, _ in rows])} s")
    print(f"  ratio, wall  {spread([ours / theirs for ours, _, theirs, _ in rows])}")
    print(f"  ratio, CPU   {spread([ours / theirs for _, ours, _, theirs in rows])}")


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
