from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.miniatures import write_parquet


@pytest.fixture
def miniature(tmp_path: Path, monkeypatch) -> Callable[..., None]:
    """Puts a tiny data set of a given name and size where ``KDRUN_DATA`` points."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path / "data"))

    def make(name: str, *, columns: tuple[str, str], test_split: str = "test", side: int = 32):
        write_parquet(
            tmp_path / "data" / name,
            {"train": 24, test_split: 8},
            columns=columns,
            class_names=["cat", "dog"],
            sizes=[(side, side)],
        )

    return make
