"""Image sets of a few random pictures, written in the layouts that the real ones have."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Height and width in pixels."""


def picture(number: int, size: Size) -> bytes:
    """A JPEG file of a random image that depends on ``number`` alone; every fifth is grey."""
    shape = size if number % 5 == 4 else (*size, 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_parquet(
    folder: Path,
    splits: Mapping[str, int],
    *,
    columns: tuple[str, str],
    class_names: Sequence[str],
    sizes: Sequence[Size],
) -> list[Path]:
    """A data set as the hub stores it: ``data/<split>-00000-of-00001.parquet``.

    Args:
        folder: of the data set.
        splits: number of images by the name of the split; classes take turns.
        columns: of the images and of the class ids.
        class_names: by class id.
        sizes: of the images, in turn.

    Returns:
        The files, in the order of the splits.
    """
    import datasets

    image, label = columns
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=list(class_names))}
    )
    files = []
    (folder / "data").mkdir(parents=True)
    for start, (split, count) in enumerate(splits.items()):
        rows = {
            image: [
                {"bytes": picture(1000 * start + number, sizes[number % len(sizes)]), "path": None}
                for number in range(count)
            ],
            label: [number % len(class_names) for number in range(count)],
        }
        files.append(folder / "data" / f"{split}-00000-of-00001.parquet")
        datasets.Dataset.from_dict(rows, features=features).to_parquet(files[-1])
    return files


def write_folders(
    folder: Path, splits: Mapping[str, int], *, class_names: Sequence[str], sizes: Sequence[Size]
) -> None:
    """A data set as its archive unpacks: ``<split>/<class>/<image>.JPEG``.

    Args:
        folder: of the data set.
        splits: number of images of each class by the name of the split.
        class_names: names of the class folders.
        sizes: of the images, in turn.
    """
    for start, (split, count) in enumerate(splits.items()):
        for kind, name in enumerate(class_names):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                file = folder / split / name / f"{number}.JPEG"
                seed = 1000 * start + 100 * kind + number
                file.write_bytes(picture(seed, sizes[number % len(sizes)]))
