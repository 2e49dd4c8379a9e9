"""``teacher.precision``, ``teacher.fold`` and ``trainer.channels_last`` in whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdrun.errors import ConfigErrors
from tests.tiny import run

CNN = ("teacher=small_cnn", "teacher.widths=[8,16]")


@pytest.mark.slow
def test_a_run_says_how_far_a_cheaper_teacher_agrees_with_itself(tmp_path: Path) -> None:
    words = (*CNN, "teacher.precision=bf16", "teacher.fold=true", "trainer.channels_last=true")
    result, directory = run(tmp_path, *words)
    told = [line for line in (directory / "log.txt").read_text().splitlines() if "exact" in line]
    assert len(told) == 1 and "agrees with its exact self on" in told[0]
    exact, _ = run(tmp_path, *CNN, "trainer.channels_last=true")
    # The teacher that is tested, and shared through the store, is the exact one.
    assert result["artefacts"]["teacher"] == exact["artefacts"]["teacher"]
    teachers = (r["networks"]["teacher"]["test"] for r in (result, exact))
    assert json.dumps(next(teachers)) == json.dumps(next(teachers))
    students = [r["networks"]["distilled"]["test_last"]["loss"] for r in (result, exact)]
    assert students[0] != students[1]
    assert students[0] == pytest.approx(students[1], rel=0.05)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        run(tmp_path, "teacher.mode=batch_stats", "teacher.fold=true")
    assert "teacher.fold: with teacher.mode=batch_stats" in str(caught.value)
