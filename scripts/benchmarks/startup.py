"""The seconds until help, an error, and the first training step, of whole commands."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import spread


def bench_startup(runs: int) -> None:
    """Time whole commands in a fresh folder each."""
    commands = {
        "kdrun --help": ["--help"],
        "kdrun ls methods": ["ls", "methods"],
        "kdrun method.temprature=2 (an error)": ["method.temprature=2"],
        "kdrun dry=true teacher=mlp student=mlp": ["dry=true", "teacher=mlp", "student=mlp"],
    }
    program = [str(Path(sys.executable).with_name("kdrun"))]
    for title, words in commands.items():
        seconds = []
        for _ in range(runs + 1):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                subprocess.run([*program, *words], cwd=folder, capture_output=True, check=False)
                seconds.append(time.perf_counter() - began)
        print(f"{title}: {spread(seconds[1:])} s")
    first_steps = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            first_steps.append(_seconds_to_first_epoch(program, folder))
    print(f"first epoch line of a digits run (teacher=mlp): {spread(first_steps)} s")


def _seconds_to_first_epoch(program: list[str], folder: str) -> float:
    began = time.perf_counter()
    words = ["teacher=mlp", "student=mlp", "training.epochs=1", "trainer.progress=plain"]
    process = subprocess.Popen(
        [*program, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    seconds = float("nan")
    for line in process.stdout:
        if "epoch 1/" in line:
            seconds = time.perf_counter() - began
            break
    process.kill()
    process.wait()
    return seconds
