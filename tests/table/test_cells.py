from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from kdrun.catalogue import Catalogue
from kdrun.config import compose
from kdrun.errors import ConfigErrors
from kdrun.table import cells as cells_module
from kdrun.table.cells import Cell, arm_of, cells_of, merge, plan, stored_plan
from kdrun.table.config import open_table

from .conftest import arm


@pytest.mark.parametrize(
    ("layers", "merged"),
    [
        ([["a.b=1"], ["a.b=2"]], ["a.b=2"]),
        ([["method=kd", "method.weight=1"], ["method.weight=2"]], ["method=kd", "method.weight=2"]),
        # A choice takes what was set in the group before it away, but not what comes with it.
        ([["training.epochs=9"], ["training=smoke"]], ["training=smoke"]),
        ([["x=1"], ["training=smoke", "training.epochs=2"]], None),
        ([["model@teacher=resnet20"], ["teacher=mlp"]], ["teacher=mlp"]),
        ([["method.weight=1"], ["dataset=digits"]], ["method.weight=1", "dataset=digits"]),
        ([["methods.weight=1"], ["method=kd"]], ["methods.weight=1", "method=kd"]),
        # What was said of the role stays; what was said of one network, or its weights, does not.
        ([["teacher.cache=logits"], ["teacher=mlp"]], ["teacher.cache=logits", "teacher=mlp"]),
        ([["image_teacher.seed=3"], ["image_teacher=mlp"]], None),
        (
            [["teacher.checkpoint=a.pt", "teacher.allow_other_data=true"], ["teacher=mlp"]],
            ["teacher=mlp"],
        ),
        (
            [["student.init_from=a.pt", "student.reads=x"], ["student=mlp"]],
            ["student.reads=x", "student=mlp"],
        ),
        ([["teacher.width=9", "teacher.mode=eval"], ["student=mlp"]], None),
    ],
)
def test_later_layers_win(layers: list[list[str]], merged: list[str] | None) -> None:
    assert merge(layers) == (merged or [word for layer in layers for word in layer])


def test_a_plan_holds_every_run_of_the_table(catalogue: Catalogue) -> None:
    arms = plan(open_table("small", catalogue), catalogue)
    assert [(arm.row, arm.column) for arm in arms] == [
        ("KD", "cnn-mlp"),
        ("KD", "cnn-cnn"),
        ("DKD", "cnn-mlp"),
        ("DKD", "cnn-cnn"),
        ("Sinkhorn", "cnn-mlp"),
    ]
    dkd = arms[2]
    assert dkd.words[0] == "protocol=holdout"
    assert {"method=dkd", "method.alpha=2", "method.beta=2"} <= set(dkd.words)
    assert "method.beta=2" not in arms[3].words
    assert dkd.epochs == {"teacher": 1, "alone": 1, "distil": 1}
    assert dkd.directory.parts[:3] == ("outputs", "digits", "small_cnn-mlp")
    assert len({arm.teacher for arm in arms}) == 1
    assert arms[0].student == dkd.student != arms[1].student


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        (["method=pcoreset", "method.rounds=3"], {"teacher": 9, "distil": 8}),
        (
            ["method=pcoreset", "method.rounds=3", "method.final_epochs=5"],
            {"teacher": 9, "distil": 11},
        ),
        (["method=kd", "teacher.checkpoint=a.pt"], {"alone": 2, "distil": 2}),
        (
            ["method=kd", "teacher.checkpoint=a.pt", "teacher.finetune=true"],
            {"teacher": 9, "alone": 2, "distil": 2},
        ),
    ],
)
def test_the_epochs_of_a_run(catalogue: Catalogue, words: list[str], epochs: dict) -> None:
    """Of all rounds of a training that is repeated; none of weights that are given."""
    words = [*words, "training.epochs=2", "training.teacher.epochs=9"]
    words.append("training.scheduler.warmup_epochs=0")
    assert arm_of("row", "column", words, compose(words, catalogue)).epochs == epochs


def test_profile_and_typed_words_reach_every_run(catalogue: Catalogue) -> None:
    table = open_table("small", catalogue)
    arms = plan(table, catalogue, profile="tiny", typed=["training.epochs=2"])
    assert all("student=mlp" in arm.words and "training.epochs=2" in arm.words for arm in arms)
    assert {arm.epochs["distil"] for arm in arms} == {2}


def test_a_mistake_in_a_cell_names_the_cell_and_comes_once(catalogue: Catalogue) -> None:
    with pytest.raises(ConfigErrors) as caught:
        plan(open_table("small", catalogue), catalogue, typed=["training.epocs=2"])
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("table small, KD / cnn-mlp: training.epocs")


def test_runs_that_bring_a_shared_network_come_first(tmp_path: Path) -> None:
    arms = [arm(tmp_path, row, column) for column in ("a", "b") for row in ("KD", "DKD")]
    order = [str(cell) for cell in cells_of(arms, (0, 1))]
    assert order[:2] == ["KD / a / seed 0", "KD / b / seed 0"]  # one for each teacher
    assert order[2:4] == ["KD / a / seed 1", "KD / b / seed 1"]  # the other students alone
    assert len(order) == len(set(order)) == 8


def test_two_rows_of_the_same_configuration_are_one_run(tmp_path: Path) -> None:
    one = arm(tmp_path, "KD")
    other = cells_module.Arm(**{**one.__dict__, "row": "KD again"})
    assert cells_of([one, other], (0,)) == [Cell(one, 0)]


def test_a_plan_is_kept_until_a_config_changes(
    catalogue: Catalogue, config_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table("small", catalogue)
    made = []
    monkeypatch.setattr(cells_module, "plan", lambda *_, **__: made.append(1) or [arm(tmp_path)])
    first = stored_plan(table, catalogue, tmp_path / "plans")
    assert stored_plan(table, catalogue, tmp_path / "plans") == first
    assert len(made) == 1
    stored_plan(table, catalogue, tmp_path / "plans", typed=["training.epochs=2"])
    assert len(made) == 2
    os.utime(config_dir / "table" / "small.yaml", (1, 1))
    stored_plan(table, catalogue, tmp_path / "plans")
    assert len(made) == 3
    for kept in (tmp_path / "plans").iterdir():
        kept.write_text("{torn")
    assert stored_plan(table, catalogue, tmp_path / "plans") == first
    assert len(made) == 4


def test_a_plan_with_a_secret_is_not_kept(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    secret = replace(arm(tmp_path), words=("method=kd", "dataset.name=hf_0123456789abcdef"))
    monkeypatch.setattr(cells_module, "plan", lambda *_, **__: [secret])
    table = open_table("small", catalogue)
    assert stored_plan(table, catalogue, tmp_path / "plans") == [secret]
    assert not (tmp_path / "plans").exists()
