"""Tiny sets of digits that are seen and heard, in the layouts of the real ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RATE = 8000


def tone(digit: int, number: int, seconds: float = 0.3, rate: int = RATE) -> bytes:
    """A WAV file: a tone whose pitch is the digit's, of a random phase and loudness."""
    import soundfile

    draw = np.random.default_rng(100 * digit + number)
    times = np.arange(int(seconds * rate)) / rate
    wave = draw.uniform(0.2, 0.8) * np.sin(
        2 * np.pi * (300 + 250 * digit) * times + draw.uniform(0, 6)
    )
    file = io.BytesIO()
    soundfile.write(file, wave.astype(np.float32), rate, format="WAV")
    return file.getvalue()


def write_spoken_digits(
    folder: Path,
    per_digit: int = 8,
    *,
    replace: dict[int, Any] | None = None,
    column: str = "audio",
) -> Path:
    """``per_digit`` training clips and three test clips of each digit, as the hub stores them.

    Args:
        folder: of the data set.
        per_digit: training clips.
        replace: other bytes for some rows of the training split.
        column: name of the column of clips.
    """
    import datasets

    features = datasets.Features(
        {column: datasets.Value("binary"), "label": datasets.Value("int64")}
    )
    (folder / "data").mkdir(parents=True)
    for split, numbers in (("train", range(per_digit)), ("test", range(50, 53))):
        clips = [(digit, number) for number in numbers for digit in range(10)]
        sounds = [tone(digit, number) for digit, number in clips]
        if split == "train":
            for row, sound in (replace or {}).items():
                sounds[row] = sound
        rows = {column: sounds, "label": [digit for digit, _ in clips]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def write_av_mnist(folder: Path, counts: Sequence[int] = (60, 20)) -> Path:
    """Random pairs of an image and a spectrogram in MultiBench's files."""
    draw = np.random.default_rng(0)
    for name in ("image", "audio"):
        (folder / name).mkdir(parents=True)
    for split, count in zip(("train", "test"), counts, strict=True):
        labels = np.arange(count) % 10
        np.save(folder / f"{split}_labels.npy", labels)
        for name, shape in (("image", (784,)), ("audio", (112, 112))):
            values = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
            np.save(folder / name / f"{split}_data.npy", values)
    return folder
