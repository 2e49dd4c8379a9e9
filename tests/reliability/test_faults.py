"""A training that goes wrong as a user sees it: one line, its status, who lists it as failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdrun.cli import run as kdrun
from tests.tiny import WORDS

DIVERGES = "training.optimizer.lr=1e30"
COMMON = (*WORDS, "method=ls", "recipe.stages.alone=null", "teacher.allow_chance=true")


def test_a_run_whose_loss_is_no_number_ends_with_status_1(tmp_path: Path, capsys) -> None:
    assert kdrun([*COMMON, f"output_dir={tmp_path}", DIVERGES]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    assert "not finite" in error or "is nan" in error or "is inf" in error
    assert "nonfinite.json" in error
    (report,) = tmp_path.rglob("nonfinite.json")
    facts = json.loads(report.read_text())
    assert facts["epoch"] == 1 and len(facts["samples"]) == 64
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("artefact.json"))


def test_a_sweep_lists_it_and_does_the_others(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rates = f"{DIVERGES.partition('=')[0]}=0.05,1e30"
    assert kdrun(["-m", *COMMON, "teacher.seed=0", rates]) == 1
    out = capsys.readouterr().out
    assert "2 runs, 1 failed" in out
    lines = [line for line in out.splitlines() if line.strip().startswith("#1")]
    assert any("failed" in line for line in lines)
    assert any("nonfinite.json" in line for line in lines), lines
    assert len(list(tmp_path.rglob("result.json"))) == 1


TABLE = f"""\
protocol: holdout
seeds: 1
metric: accuracy
direction: max
epoch: last
baseline: Good
run: {" ".join(word for word in COMMON if not word.startswith(("teacher=", "student=")))}
columns:
  pair: teacher=mlp student=small_cnn
rows:
  Good: training.optimizer.lr=0.05
  Bad: {DIVERGES}
"""


@pytest.mark.slow
def test_a_table_lists_it_and_does_the_others(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "table").mkdir(parents=True)
    (tmp_path / "configs" / "table" / "faults.yaml").write_text(TABLE)
    table = ["--config-dir", str(tmp_path / "configs"), "table", "faults"]
    assert kdrun(table) == 1
    out = capsys.readouterr().out
    assert "failed" in out and "nonfinite.json" in out
    assert len(list(tmp_path.rglob("result.json"))) == 1
    (recorded,) = tmp_path.rglob("error.txt")
    assert "nonfinite.json" in recorded.read_text()
