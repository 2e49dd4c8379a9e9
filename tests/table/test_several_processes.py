"""Real runs of one table by several processes: started by hand, killed, and by launchers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PART = ["rows=KD,DKD,Sinkhorn", "columns=cnn-mlp", "seeds=3", "trainer=cpu"]
CELLS = 9


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(config_dir: Path, *words: str) -> list[str]:
    kdrun = [sys.executable, "-m", "kdrun", "--config-dir", str(config_dir)]
    return [*kdrun, "table", "small", *PART, *words]


def test_three_workers_one_killed(config_dir: Path, tmp_path: Path) -> None:
    """Every run of the table is done exactly once, that of the killed worker by another."""
    logs = [tmp_path / f"worker{number}.log" for number in range(3)]
    workers = []
    for log in logs:
        workers.append(
            subprocess.Popen(
                command(config_dir, "training.epochs=3"),
                cwd=tmp_path,
                env=environment(),
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    deadline = time.monotonic() + 240
    while not re.search(": started", logs[0].read_text()):
        assert time.monotonic() < deadline and workers[0].poll() is None, logs[0].read_text()
        time.sleep(0.02)
    workers[0].send_signal(signal.SIGKILL)
    workers[0].wait()
    ends = [worker.wait(timeout=deadline - time.monotonic()) for worker in workers[1:]]
    told = "".join(log.read_text() for log in logs)
    assert ends == [0, 0], told
    done = Counter(re.findall(r"^(.* seed \d): done", told, re.MULTILINE))
    started = Counter(re.findall(r"^(.* seed \d): started", told, re.MULTILINE))
    assert len(done) == CELLS and set(done.values()) == {1}, told
    killed = Counter(re.findall(r"^(.* seed \d): started", logs[0].read_text(), re.MULTILINE))
    lost = killed - Counter(re.findall(r"^(.* seed \d): done", logs[0].read_text(), re.MULTILINE))
    assert started == done + lost
    results = list(tmp_path.glob("outputs/digits/*/*/seed*/result.json"))
    assert len(results) == CELLS
    assert len(list(tmp_path.glob("outputs/store/network/*/artefact.json"))) == 1 + 3


@pytest.mark.parametrize(
    ("launcher", "package"),
    [("joblib", "hydra_plugins.hydra_joblib_launcher"), ("local", "submitit"), ("ray", "ray")],
)
def test_workers_of_a_launcher(
    config_dir: Path, tmp_path: Path, launcher: str, package: str
) -> None:
    pytest.importorskip(package)
    if launcher == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    done = subprocess.run(
        command(config_dir, "workers=2", f"launcher={launcher}"),
        cwd=tmp_path,
        env=environment() | {"RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CELLS} runs, {CELLS} done" in done.stdout
    assert len(list(tmp_path.glob("outputs/digits/*/*/seed*/result.json"))) == CELLS
    assert (tmp_path / "outputs" / "tables" / "small" / "table.md").is_file()
