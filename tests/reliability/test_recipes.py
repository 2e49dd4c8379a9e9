"""Stages taken out of a recipe on the command line: gone, or one line that says who needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.cli import run as kdrun
from kdrun.report.summary import summary_table
from tests.tiny import WORDS, composed, run


def test_a_stage_that_nobody_needs_is_left_out(tmp_path: Path) -> None:
    result, directory = run(tmp_path, "method=ls", "recipe.stages.alone=null")
    assert "alone" not in result["artefacts"]
    assert set(result["networks"]) == {"teacher", "distilled"}
    assert (directory / "artefact.json").exists()


def test_a_recipe_without_an_evaluation(tmp_path: Path) -> None:
    result, directory = run(
        tmp_path, "method=ls", "recipe.stages.alone=null", "recipe.stages.evaluate=null"
    )
    assert (result["networks"], result["objective"]) == ({}, None)
    assert (directory / "student.safetensors").exists()
    assert "no stage of this recipe evaluates the networks" in summary_table(result)


@pytest.mark.parametrize(("stage", "method"), [("teacher", "kd"), ("distil", "ls")])
def test_a_stage_that_another_needs_is_one_line(tmp_path: Path, capsys, stage, method) -> None:
    words = [*WORDS, f"output_dir={tmp_path}", "recipe.stages.alone=null"]
    assert kdrun([*words, f"method={method}", f"recipe.stages.{stage}=null"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"the recipe has no stage {stage} before one that needs what it makes; "
        f"do not take recipe.stages.{stage} out\n"
    )


def test_the_same_recipe_is_the_same_run() -> None:
    """A recipe without a stage, and one that it was taken out of, are one experiment."""
    values = composed("recipe.stages.alone=null").values
    assert "alone" not in values["recipe"]["stages"]
