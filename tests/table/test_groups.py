"""Tables that share an order of data: which runs are claimed together, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kdrun.catalogue import Catalogue
from kdrun.cli import run as kdrun
from kdrun.errors import ConfigErrors, Interrupted, UserError
from kdrun.table.cells import Cell, plan
from kdrun.table.config import read_table
from kdrun.table.progress import Board, State, claim
from kdrun.table.request import read_request
from kdrun.table.work import work

from .conftest import Recorder, arm, finish


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    """Two rows in two columns, three seeds; those of a column may go side by side."""
    arms = [arm(tmp_path, row, column) for column in ("a-b", "c-d") for row in ("KD", "DKD")]
    arms = [replace(one, group=one.column, at_once=4) for one in arms]
    return [Cell(one, seed) for seed in range(3) for one in arms]


class Groups:
    """Does runs side by side: leaves what finished runs leave, or fails as it is told."""

    def __init__(self, errors: dict[int, BaseException] | None = None) -> None:
        self.errors, self.done = errors or {}, []

    def __call__(self, cells: Sequence[Cell]) -> list[BaseException | None]:
        self.done.append(list(cells))
        for cell in cells:
            if cell.seed not in self.errors:
                finish(cell)
        return [self.errors.get(cell.seed) for cell in cells]


def alone(words: list[str]) -> None:
    raise AssertionError(f"{words} was run by itself")


@pytest.mark.slow
def test_runs_of_a_group_are_claimed_together(cells: list[Cell], view: Recorder) -> None:
    groups = Groups()
    work(cells, alone, view, began=time.time(), run_group=groups)
    assert [[cell.arm.column for cell in group] for group in groups.done] == [
        ["a-b"] * 4,
        ["c-d"] * 4,
        ["a-b"] * 2,
        ["c-d"] * 2,
    ]
    assert Board(cells).of(State.DONE) == cells
    assert len([event for event, _ in view.events if event == "finished"]) == len(cells)


@pytest.mark.slow
def test_runs_of_other_processes_are_left_to_them(cells: list[Cell], view: Recorder) -> None:
    groups = Groups()
    with claim(cells[1]):
        left = [cell for cell in cells if cell != cells[1]]
        work(left, alone, view, began=time.time(), run_group=groups)
    assert cells[1] not in [cell for group in groups.done for cell in group]


@pytest.mark.slow
def test_each_failure_is_recorded_where_it_belongs(cells: list[Cell], view: Recorder) -> None:
    work(cells, alone, view, began=time.time(), run_group=Groups({1: UserError("no")}))
    failed = Board(cells).of(State.FAILED)
    assert failed == [cell for cell in cells if cell.seed == 1]
    assert {(cell.directory / "error.txt").read_text() for cell in failed} == {"no\n"}


def test_an_interruption_is_no_failure(cells: list[Cell], view: Recorder) -> None:
    groups = Groups({0: UserError("no"), 1: Interrupted("kdrun", signal_number=15)})
    with pytest.raises(Interrupted) as caught:
        work(cells, alone, view, began=time.time(), run_group=groups)
    assert caught.value.exit_code == 143 and len(groups.done) == 1
    board = Board(cells)
    assert {cell.seed for cell in board.of(State.FAILED)} == {0}


def test_time_of_a_run_is_its_share_of_the_group(cells: list[Cell]) -> None:
    finish(cells[0], seconds=40.0)
    path = cells[0].directory / "result.json"
    path.write_text(path.read_text().replace("40.0", '40.0, "side_by_side": 4'))
    assert Board(cells).seconds_of(cells[0]) == 10.0


TREE = {
    "protocol": "holdout",
    "seeds": 2,
    "metric": "accuracy",
    "direction": "max",
    "baseline": "KD",
    "columns": {"a": "teacher=small_cnn student=mlp"},
    "rows": {"KD": "method=kd", "DKD": "method=dkd", "DML": "method=dml"},
}


def test_the_order_that_a_table_says_holds_for_all_its_runs(catalogue: Catalogue) -> None:
    shared = plan(read_table(TREE | {"data_order": "shared"}, "t", ""), catalogue)
    own = plan(read_table(TREE | {"data_order": "independent"}, "t", ""), catalogue)
    assert all("data_seed=0" in one.words for one in shared)
    assert len({one.group for one in shared}) == 1 and shared[0].group
    assert {one.group for one in own} == {""}
    assert plan(read_table(TREE, "t", ""), catalogue) == own
    assert {one.directory for one in shared}.isdisjoint(one.directory for one in own)


def test_the_order_is_the_tables_own(catalogue: Catalogue) -> None:
    with pytest.raises(ConfigErrors, match="data_seed=1: is said by the table's entry data_order"):
        read_table(TREE | {"run": "data_seed=1"}, "t", "")
    with pytest.raises(ConfigErrors, match="data_order: must be one of shared, independent"):
        read_table(TREE | {"data_order": "own"}, "t", "")
    with pytest.raises(UserError, match="data_order"):
        read_request(["small", "data_seed=1"])


@pytest.mark.slow
def test_a_table_runs_side_by_side_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a method that has no teacher to share, which goes by itself."""
    monkeypatch.chdir(tmp_path)
    words = ["teacher=small_cnn", "training=smoke", "trainer.progress=off", "seeds=2"]
    table = tmp_path / "configs" / "table" / "order.yaml"
    table.parent.mkdir(parents=True)
    table.write_text(
        "# Orders.\nprotocol: holdout\nseeds: 2\nmetric: accuracy\ndirection: max\nbaseline: KD\n"
        "data_order: shared\nrun: teacher.allow_chance=true\n"
        "columns:\n  a: student=mlp student.hidden=[16]\n"
        "rows:\n  KD: method=kd\n  DML: method=dml\n"
    )
    flags = ["--config-dir", str(tmp_path / "configs")]
    assert kdrun([*flags, "table", "order", *words]) == 0
    out = capsys.readouterr().out
    assert "data order: the same for all seeds" in out
    results = sorted(tmp_path.glob("outputs/digits/*/*/seed*/result.json"))
    assert len(results) == 4
    side_by_side = {path.parts[-3][:2]: '"side_by_side": 2' in path.read_text() for path in results}
    assert side_by_side == {"kd": True, "dm": False}
