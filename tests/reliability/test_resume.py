"""Stopped at any step, or killed at any moment, and started again: the same, bit for bit."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.reliability.interrupted import (
    HOW,
    Journal,
    draw,
    outcome,
    run_until,
    watched,
    without_times,
)
from tests.spoken import write_spoken_digits
from tests.tiny import run

TINY = ("training.epochs=2", "training.batch_size=160", "teacher.allow_chance=true")
NARROW = ("student.widths=[2,2,4]",)
CONVOLUTIONS = (*NARROW, "teacher=small_cnn", "teacher.widths=[4,4,4]")
"""For methods that read feature maps of the teacher."""
LANGUAGE = (
    *("dataset=text_folder", "dataset.length=8", "dataset.train_rows=24", "training.batch_size=8"),
    *("teacher=llama_nano", "student=gpt2_nano"),
)
THREE_PHASES = (
    *("student=small_cnn", "student.reads=audio", "student.widths=[4,6,9]"),
    *("aux_teacher=small_cnn", "aux_teacher.reads=image", "aux_teacher.widths=[4,6,9]"),
    *("teacher=digit_fusion", "teacher.widths=[4,4]", "teacher.hidden=[12,9]"),
    *("dataset.train_pairs=50", "dataset.validation_pairs=20", "training.batch_size=16"),
    *("recipe.stages.cotrain.epochs=1", "recipe.stages.specialise.epochs=2"),
)
TWO_TOWERS = (
    *("teacher=two_tower", "training.teacher.epochs=3", "student=mlp_small", "student.hidden=[16]"),
    *("dataset.steps=4", "training.scheduler.warmup_epochs=0"),
)
SEARCH = (
    *("dataset=digits", "teacher=resnet8_half", "student=resnet8_half", "training=smoke"),
    *("training.epochs=1", "recipe.stages.search.evaluations=3"),
    *("recipe.stages.search.scorer.batch_size=8", "recipe.stages.search.strategy.population=2"),
    *("recipe.stages.search.strategy.tournament=2", "recipe.stages.search.strategy.parents=1"),
)

STREAMING, COMPILED = "streaming workers", "compiled step"
CASES: dict[str, tuple[str, ...]] = {
    "logits": ("method=kd", *NARROW),
    "features and projectors": ("method=fitnet", *CONVOLUTIONS),
    "memory bank": ("method=crd", *CONVOLUTIONS),
    "two optimisers": ("method=dml", *NARROW),
    "views": ("method=mlld", *NARROW),
    "language": ("method=taid", *LANGUAGE),
    "three phases": ("method=mst", "method.mask_reduction=1", *THREE_PHASES),
    "rounds": ("method=pcoreset", "method.rounds=1", "method.queries=5", *TWO_TOWERS),
    "unlabelled samples": ("method=dho", *TWO_TOWERS),
    "search": ("method=diswot", *SEARCH),
    "accumulation": ("method=kd", *NARROW, "trainer.accumulate=4", "training.clip_norm=1.0"),
    "moving average": ("method=fitnet", *CONVOLUTIONS, "training.ema=0.9"),
    "recorded teacher": ("method=kd", *NARROW, "teacher.cache=logits", "teacher.cache_views=2"),
    "mixed batches": (
        *("method=kd", *NARROW),
        *("dataset.mix.mixup=0.4", "dataset.augmentation.crop_padding=1"),
    ),
    STREAMING: ("method=kd", *NARROW),
    COMPILED: ("method=kd", *NARROW, "trainer.compile=true"),
}

QUICK = {("logits", "term"), ("moving average", "step"), ("mixed batches", "write")}
"""What the fast tests look at."""


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


def texts(root: Path) -> tuple[str, ...]:
    """Words for a folder of short texts."""
    root.mkdir()
    for number in range(3):
        sentences = (f"{i} times {number} is {i * number}.\n" for i in range(20))
        (root / f"{number}.txt").write_text("".join(sentences))
    return (f"dataset.source.path={root}",)


def spoken_digits(root: Path) -> tuple[str, ...]:
    """Words for digits that are seen and heard."""
    pytest.importorskip("soundfile")
    return (f"dataset.name={write_spoken_digits(root)}",)


DATA: dict[str, Callable[[Path], tuple[str, ...]]] = {
    STREAMING: images,
    "language": texts,
    "three phases": spoken_digits,
}
"""What makes the data of a case that does not train on the digits."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Whole]]:
    """Runs a case to its end, once."""
    known: dict[str, Whole] = {}

    def of(case: str) -> Whole:
        if case not in known:
            root = tmp_path_factory.mktemp("whole")
            words = (*TINY, *CASES[case])
            if case in DATA:
                words = (*words, *DATA[case](root / "data"))
            with watched(Journal(root / "journal")) as seen:
                result, _ = run(root / "out", *words)
            batches = Journal(root / "journal").batches()
            known[case] = Whole(
                words, without_times(result), outcome(root), batches, seen.steps, seen.renames
            )
        return known[case]

    with pytest.MonkeyPatch.context() as patch:
        datasets = pytest.importorskip("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
        yield of


def difference(found: dict[str, Any], expected: dict[str, Any], place: str) -> Any:
    """The rows in which two tables of metrics differ."""
    if not place.endswith(".csv"):
        return ""
    pairs = zip(found[place], expected[place], strict=True)
    return [{k: (a[k], b[k]) for k in a if a[k] != b.get(k)} for a, b in pairs]


def check(case: str, how: str, root: Path, expected: Whole) -> None:
    """End a case early, the first time as ``how`` says, then let it end, and compare."""
    dice = random.Random(f"{case}, {how}")
    fork = case != COMPILED
    times = 1 if case in (STREAMING, COMPILED) else dice.choice((1, 1, 2, 3))  # Slow to start.
    statuses = []
    for number in range(times):
        ending = draw(dice, expected.steps, expected.renames, how if number == 0 else None)
        statuses.append((ending, run_until(ending, root, expected.words, fork)))
        if statuses[-1][1] == 0:
            break  # There was less left to do than that.
    assert statuses[0][1] == (143 if how == "term" else -9), statuses
    assert all(status in (0, 143, -9) for _, status in statuses), statuses
    with watched(Journal(root / "journal")):
        result, _ = run(root / "out", *expected.words)
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


@pytest.mark.parametrize(
    ("case", "how"),
    [
        pytest.param(case, how, marks=[] if (case, how) in QUICK else [pytest.mark.slow])
        for case in CASES
        for how in HOW
    ],
)
def test_ended_early_then_started_again(tmp_path: Path, whole, case: str, how: str) -> None:
    if case == COMPILED and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    check(case, how, tmp_path, whole(case))
