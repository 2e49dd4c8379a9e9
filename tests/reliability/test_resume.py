"""Stopped at any step, or killed at any moment, and started again: the same, bit for bit."""

from __future__ import annotations

import io
import os
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.reliability.interrupted import (
    Journal,
    draw,
    outcome,
    run_until,
    watched,
    without_times,
)
from tests.tiny import run

TINY = (
    *("training.epochs=2", "training.batch_size=160", "teacher.allow_chance=true"),
    "student.widths=[2,2,4]",
)
CONVOLUTIONS = ("teacher=small_cnn", "teacher.widths=[4,4,4]")
"""For methods that read feature maps of the teacher."""

CASES: dict[str, tuple[str, ...]] = {
    "logits": ("method=kd",),
    "features and projectors": ("method=fitnet", *CONVOLUTIONS),
    "memory bank": ("method=crd", *CONVOLUTIONS),
    "two optimisers": ("method=dml",),
    "views": ("method=mlld",),
    "accumulation": ("method=kd", "trainer.accumulate=4", "training.clip_norm=1.0"),
    "moving average": ("method=fitnet", *CONVOLUTIONS, "training.ema=0.9"),
    "recorded teacher": ("method=kd", "teacher.cache=logits", "teacher.cache_views=2"),
    "mixed batches": ("method=kd", "dataset.mix.mixup=0.4", "dataset.augmentation.crop_padding=1"),
    "streaming workers": ("method=kd",),
}


COMPILED = "compiled step"
CASES_WITH_COMPILER = {COMPILED: ("method=kd", "trainer.compile=true")}


class Whole(NamedTuple):
    """An experiment that was left alone."""

    words: tuple[str, ...]
    result: Any
    left: dict[str, Any]
    batches: dict[str, set[str]]
    steps: int
    renames: int


def images(root: Path) -> tuple[str, ...]:
    """Words for a set of 48 pictures of different sizes in class folders, read by two workers."""
    for split, count in (("train", 12), ("test", 4)):
        for kind in range(3):
            folder = root / split / f"kind{kind}"
            folder.mkdir(parents=True)
            for number in range(count):
                dice = np.random.default_rng([kind, number, count])
                pixels = dice.integers(0, 256, (12 + number, 14, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                (folder / f"{number}.png").write_bytes(buffer.getvalue())
    return (
        *("dataset=image_folder", f"dataset.name={root}", "dataset.workers=2"),
        *("dataset.image_size=8", "dataset.resize=10", "training.batch_size=5"),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """Runs a case to its end, once."""
    known: dict[str, Whole] = {}

    def of(case: str) -> Whole:
        if case not in known:
            root = tmp_path_factory.mktemp("whole")
            words = (*TINY, *(CASES | CASES_WITH_COMPILER)[case])
            if case == "streaming workers":
                words = (*words, *images(root / "images"))
            with watched(Journal(root / "journal")) as seen:
                result, _ = run(root / "out", *words)
            batches = Journal(root / "journal").batches()
            known[case] = Whole(
                words, without_times(result), outcome(root), batches, seen.steps, seen.renames
            )
        return known[case]

    return of


def difference(found: dict[str, Any], expected: dict[str, Any], place: str) -> Any:
    """The rows in which two tables of metrics differ."""
    if not place.endswith(".csv"):
        return ""
    pairs = zip(found[place], expected[place], strict=True)
    return [{k: (a[k], b[k]) for k in a if a[k] != b.get(k)} for a, b in pairs]


def check(case: str, dice: random.Random, root: Path, whole, fork: bool = True) -> None:
    """End a case early, perhaps several times, then let it end, and compare."""
    expected = whole(case)
    statuses = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        ending = draw(dice, expected.steps, expected.renames)
        statuses.append((ending, run_until(ending, root, expected.words, fork)))
        if statuses[-1][1] == 0:
            break  # There was less left to do than that.
    assert all(status in (0, 143, -9) for _, status in statuses), statuses
    with watched(Journal(root / "journal")):
        result, directory = run(root / "out", *expected.words)
    told = f"{case}: {statuses}"
    journal = Journal(root / "journal").batches()
    assert journal == expected.batches, f"{told}: other batches"
    left = outcome(root)
    assert left.keys() == expected.left.keys(), told
    different = [place for place in left if left[place] != expected.left[place]]
    assert not different, f"{told}: {different} {difference(left, expected.left, different[0])}"
    assert without_times(result) == expected.result, told
    remains = [p for p in (root / "out").rglob("*") if p.name.endswith(".tmp")]
    assert not remains, f"{told}: {remains}"


@pytest.mark.parametrize("case", ["logits", "memory bank", "two optimisers"])
def test_ended_early_then_started_again(tmp_path: Path, whole, case: str) -> None:
    check(case, random.Random(case), tmp_path, whole)


@pytest.mark.slow
def test_fifty_early_ends(tmp_path: Path, whole) -> None:
    dice = random.Random(50)
    for number in range(50):
        root = tmp_path / str(number)
        root.mkdir()
        check(list(CASES)[number % len(CASES)], dice, root, whole)
        shutil.rmtree(root)


@pytest.mark.slow
def test_a_compiled_step(tmp_path: Path, whole) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    for number in (1, 4):
        root = tmp_path / str(number)
        root.mkdir()
        check(COMPILED, random.Random(number), root, whole, fork=False)
