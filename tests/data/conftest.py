"""Small image sets made on the spot, in the layouts that real ones have."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from kdrun.data.resident import Samples

CLASS_NAMES = ["cat", "dog", "eel"]


@pytest.fixture
def samples() -> Samples:
    """50 random 8-bit images of 3x12x12 in 5 classes, numbered from 100."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return Samples(images, torch.arange(50) % 5, torch.arange(100, 150))


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """No test reads or fills the user's caches, or finds data on this machine by chance."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The cache of the datasets library, moved to a temporary folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def pixels(number: int, height: int = 10, width: int = 10) -> np.ndarray:
    """A random colour image ``(H, W, 3)`` that depends on ``number`` alone."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(number: int, height: int = 10, width: int = 10) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number, height, width)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def hub_folder(tmp_path, monkeypatch, hub_cache):
    """``KDRUN_DATA`` with the hub data set ``owner/animals``: 30 train, 12 test images."""
    folder = tmp_path / "data" / "owner" / "animals" / "data"
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(30)), ("test", range(100, 112))):
        features = hub_cache.Features(
            {"img": hub_cache.Image(), "kind": hub_cache.ClassLabel(names=CLASS_NAMES)}
        )
        columns = {
            "img": [{"bytes": png(number), "path": None} for number in numbers],
            "kind": [number % 3 for number in numbers],
        }
        rows = hub_cache.Dataset.from_dict(columns, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path / "data"))
    return folder.parent


@pytest.fixture
def class_folders(tmp_path):
    """``train/<class>/`` with 8 images of different sizes per class, ``test/<class>/`` with 4."""
    root = tmp_path / "pictures"
    for split, count in (("train", 8), ("test", 4)):
        for kind, name in enumerate(CLASS_NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                size = (20 + number, 30 - number)
                file = root / split / name / f"{number}.png"
                file.write_bytes(png(100 * kind + number, *size))
    return root
