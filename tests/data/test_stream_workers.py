"""What workers that decode images leave alone."""

from __future__ import annotations

import gc
import sys
import time

import pytest
import torch

from kdrun.data import streaming
from kdrun.data.decode import decode
from kdrun.data.images import Images

PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def train(root, workers: int):
    module = Images(
        name=str(root),
        storage="stream",
        image_size=12,
        resize=16,
        crop_scale=[0.08, 1.0],
        workers=workers,
        **PLAIN,
    )
    module.prepare("paper")
    return module.train(batch_size=5, seed=2, device="cpu")


def test_crops_leave_the_generators_of_other_devices_alone(class_folders, monkeypatch):
    def all_devices(seed):
        raise AssertionError("this sets the generator of every GPU too")

    loader = train(class_folders, workers=0)
    monkeypatch.setattr(torch, "manual_seed", all_devices)
    assert len(list(loader)) == 5
    loader.replay(0, 1)


@pytest.fixture
def collector_by_hand():
    was_on = gc.isenabled()
    gc.disable()
    yield
    if was_on:
        gc.enable()


def leave_in_a_circle(loader) -> None:
    """Use a loader; afterwards only the collector can find it."""
    assert len(list(loader)) == 5
    circle = [loader]
    circle.append(circle)


def test_workers_do_not_clean_up_after_an_earlier_loader(
    class_folders, monkeypatch, collector_by_hand, tmp_path
):
    leave_in_a_circle(train(class_folders, workers=1))

    def collect_and_decode(*words):
        sys.unraisablehook = lambda broken: (tmp_path / "broken").write_text(str(broken.exc_value))
        gc.collect()
        return decode(*words)

    monkeypatch.setattr(streaming, "decode", collect_and_decode)
    assert len(list(train(class_folders, workers=1))) == 5
    assert not (tmp_path / "broken").exists()


def test_the_workers_of_a_loader_in_a_circle_end_at_once(class_folders, collector_by_hand):
    leave_in_a_circle(train(class_folders, workers=1))
    began = time.perf_counter()
    gc.collect()
    assert time.perf_counter() - began < 4  # A worker that was not told is waited for 5 seconds.
