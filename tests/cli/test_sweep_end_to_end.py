"""Sweeps of real runs in other processes."""

import os
import subprocess
import sys

import pytest

SMALL = ["training=smoke", "teacher=mlp", "student=mlp", "trainer=cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib", "hydra_joblib_launcher"), ("local", "submitit")]
)
def test_launchers(tmp_path, launcher, package):
    pytest.importorskip(package if package == "submitit" else "joblib")
    command = [sys.executable, "-m", "kdrun", "-m", *SMALL, f"launcher={launcher}"]
    done = subprocess.run(
        [*command, "method=kd,dkd", "student.init_from=null,nowhere.safetensors"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "4 runs, 2 failed" in done.stdout
    assert "student.init_from=nowhere.safetensors: no such file" in done.stdout
    assert len(list(tmp_path.glob("outputs/digits/**/result.json"))) == 2
