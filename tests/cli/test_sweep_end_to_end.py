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


@pytest.mark.slow
def test_a_search_gives_up_the_hopeless_and_survives_the_diverged(tmp_path):
    """One good trial, one that hardly learns, one whose loss overflows; then the report of all."""
    optuna = pytest.importorskip("optuna")
    place = ["hydra.sweep.dir=search", "pruner=median", "pruner.n_startup_trials=1"]
    place += ["pruner.n_warmup_steps=0"]
    small = ["teacher=mlp", "student=mlp", "trainer=cpu", "training.epochs=3", "method=kd"]

    def kdrun(*words):
        return subprocess.run(
            [sys.executable, "-m", "kdrun", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    rates = ["0.05", "interval(1e-7,2e-7)", "interval(1e30,2e30)"]
    ends = []
    for number, rate in enumerate(rates, start=1):
        # The teacher is the same for all.
        optimizer = "{_target_: torch.optim.SGD, lr: 0.05, momentum: 0.9}"
        words = [f"training.optimizer.lr={rate}", f"training.teacher.optimizer={optimizer}"]
        words.append("recipe.stages.alone=null")
        search = ["sweeper=optuna", f"sweeper.n_trials={number}", *place]
        ends.append(kdrun("-m", *search, *small, *words))
    assert [end.returncode for end in ends] == [0, 0, 1], ends[-1].stdout + ends[-1].stderr
    study = optuna.load_study(study_name="kdrun", storage=f"sqlite:///{tmp_path}/search/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert study.trials[1].user_attrs["given_up_after_epoch"] == 1
    assert study.best_trial.number == 0
    told = kdrun("report", "search").stdout
    assert "3 runs, 1 done, 1 failed, 1 pruned" in told
    assert "#1 given up after epoch 1" in told
