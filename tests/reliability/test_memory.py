"""Long trainings and many runs in one process hold no more memory at the end than early on."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from kdrun.cli import run as kdrun
from kdrun.job import Record
from tests.tiny import WORDS, Training


def resident_bytes() -> int:
    """Memory of this process in use now."""
    gc.collect()
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(status.read_text().split()[1]) * 4096


def live_tensors() -> int:
    gc.collect()
    # By type: asking some lazy objects for their class would import packages.
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


@pytest.mark.parametrize(
    ("epochs", "allowed"),
    [(20, 8 << 20), pytest.param(400, 8 << 20, marks=pytest.mark.slow)],
)
def test_training_does_not_grow(tmp_path: Path, epochs: int, allowed: int) -> None:
    """From a quarter of the way to the end; 18 steps an epoch, with a checkpoint at each."""
    training = Training(tmp_path, epochs=epochs, batch_size=64)
    distiller = training.start()
    seen = {}
    begin = distiller.on_validation_epoch_start

    def measured() -> None:
        if distiller.epoch in (epochs // 4, epochs - 1):
            seen[distiller.epoch] = resident_bytes(), live_tensors()
        begin()

    distiller.on_validation_epoch_start = measured
    training.start = lambda: distiller
    training.run()
    (early_bytes, early_tensors), (late_bytes, late_tensors) = seen.values()
    assert late_tensors <= early_tensors, f"{early_tensors} tensors became {late_tensors}"
    assert late_bytes - early_bytes < allowed, f"{(late_bytes - early_bytes) / 2**20:.1f} MiB more"
    print(f"{epochs * 18} steps: {(late_bytes - early_bytes) / 2**20:+.2f} MiB")


@pytest.mark.slow
def test_a_sweep_in_one_process_does_not_grow(tmp_path: Path, monkeypatch) -> None:
    """A hundred runs that share a teacher; the first twenty warm up caches."""
    monkeypatch.chdir(tmp_path)
    seen, write = [], Record.write

    def measured(record: Record, directory: Path) -> None:
        write(record, directory)
        if record.status == "done" and record.number in (20, 99):
            seen.append((resident_bytes(), live_tensors()))

    monkeypatch.setattr(Record, "write", measured)
    assert kdrun(["-m", *WORDS, "method=ls", "teacher.seed=0", "seed=range(0,100)"]) == 0
    (early_bytes, early_tensors), (late_bytes, late_tensors) = seen
    grown = (late_bytes - early_bytes) / 2**20
    print(f"79 runs: {grown:+.2f} MiB, {late_tensors - early_tensors:+d} tensors")
    assert late_tensors <= early_tensors + 10
    assert grown < 40
