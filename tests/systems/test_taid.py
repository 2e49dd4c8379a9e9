"""TAID as a system: by itself it is a run on text, and its target moves as it should.

Kills within and between phases, full scale and bad input: ``tests/stages/test_language.py``.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from tests.tiny import run


def test_by_itself_it_is_a_run_on_source_code() -> None:
    config = compose(["method=taid"], open_catalogue())
    assert (config.names["dataset"], config.names["task"]) == (
        "python_source",
        "language_modelling",
    )
    assert (config.names["teacher"], config.names["student"]) == ("gpt2_mini", "gpt2_nano")
    typed = compose(
        ["method=taid", "dataset=digits", "teacher=mlp", "student=mlp"], open_catalogue()
    )
    assert typed.names["task"] == "classification"


@pytest.mark.slow
def test_the_target_moves_ahead_of_the_line_to_the_teacher(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    text = "".join(f"{i} times {j} is {i * j}.\n" for i in range(30) for j in range(30))
    (tmp_path / "texts" / "a.txt").write_text(text)
    _, directory = run(
        tmp_path / "out",
        *("method=taid", "method.t_start=0.2", "teacher=gpt2_nano", "student=gpt2_nano"),
        *("dataset=text_folder", f"dataset.source.path={tmp_path / 'texts'}", "dataset.length=32"),
        *("training.epochs=6", "training.batch_size=32", "teacher.allow_chance=true"),
    )
    with (directory / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    shares = [row["taid_t"] for row in rows]
    assert shares == sorted(shares) and 0.2 <= shares[0] < shares[-1] <= 1
    assert all(row["taid_t"] >= row["taid_line"] - 1e-6 for row in rows)
    assert max(row["taid_adaptive"] for row in rows) > 0
