"""Runs of several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kdrun import launch
from kdrun.errors import UserError

LAUNCHER = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", launch.OUTCOME)


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_needed_for_several_processes_that_nobody_started(monkeypatch):
    assert not launch.is_needed({"devices": 1, "num_nodes": 1})
    assert launch.is_needed({"devices": 2, "num_nodes": 1})
    assert launch.is_needed({"devices": 1, "num_nodes": 2})
    monkeypatch.setenv("RANK", "0")
    assert not launch.is_needed({"devices": 2, "num_nodes": 1})
    monkeypatch.delenv("RANK")
    # A shell inside a SLURM allocation is one task; srun gives several.
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launch.is_needed({"devices": 2, "num_nodes": 1})
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert not launch.is_needed({"devices": 2, "num_nodes": 1})


def test_only_the_first_process_is_main(monkeypatch):
    assert launch.is_main()
    monkeypatch.setenv("RANK", "1")
    assert not launch.is_main()


def test_several_machines_need_a_launcher_on_each():
    with pytest.raises(UserError, match="torchrun --nnodes 2 --nproc-per-node 4"):
        launch.launch(["seed=0"], {"devices": 4, "num_nodes": 2})


def test_the_outcome_is_left_by_the_first_process_only(monkeypatch, tmp_path):
    path = tmp_path / "outcome.json"
    launch.report(0, 1.0)
    monkeypatch.setenv(launch.OUTCOME, str(path))
    monkeypatch.setenv("RANK", "1")
    launch.report(0, 1.0)
    assert not path.exists()
    monkeypatch.setenv("RANK", "0")
    launch.report(0, 1.0, "outputs/a")
    told = {"exit_code": 0, "objective": 1.0, "directory": "outputs/a"}
    assert json.loads(path.read_text()) == told


def run(words, folder):
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    command = [sys.executable, "-m", "kdrun", "trainer=ddp", "trainer.accelerator=cpu", *words]
    return subprocess.run(
        command,
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


SMALL = ["training=smoke", "teacher=mlp", "student=mlp"]


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path):
    done = run(SMALL, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training: ") == 1
    assert done.stderr == ""
    assert len(list(tmp_path.glob("outputs/**/result.json"))) == 1


@pytest.mark.slow
def test_a_mistake_found_late_is_one_line_and_status_2(tmp_path):
    done = run([*SMALL, "student.init_from=nowhere.safetensors"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["student.init_from=nowhere.safetensors: no such file"]


@pytest.mark.slow
def test_a_sweep_of_runs_of_two_processes(tmp_path):
    done = run([*SMALL, "-m", "seed=0,1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 runs, 0 failed" in done.stdout
    assert len(list(tmp_path.glob("outputs/sweeps/*"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 2.0, 3.5, 6.0])
def test_ctrl_c_at_any_moment_is_no_traceback(tmp_path, seconds):
    """While the processes are imported, while they find each other, and at work."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    command = [sys.executable, "-m", "kdrun", "trainer=ddp", "trainer.accelerator=cpu", *SMALL]
    process = subprocess.Popen(
        [*command, "training.epochs=200"],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell's background jobs, and what they start, do not hear it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    # Where it hits Python in code made at run time (a dataclass), Python ends by the signal itself
    # after we have dealt with it; a shell calls both 130.
    assert process.returncode in (130, -signal.SIGINT), told
    assert "Traceback" not in told and "gloo" not in told.lower(), told
    if seconds > 1:
        assert told.splitlines()[-1].startswith("interrupted"), told
