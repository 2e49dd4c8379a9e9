from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.cli import run as kdrun
from kdrun.report.formats import count, notes
from kdrun.table.request import chosen_arms, chosen_table, read_request
from kdrun.table.results import results_of_table

from .conftest import write_run

TABLE = """\
# Two methods.
protocol: holdout
seeds: 2
metric: accuracy
direction: max
baseline: KD
source: the paper
columns:
  a: teacher=resnet20 student=resnet8
  b: teacher=vgg13 student=vgg8
rows:
  Teacher: {network: teacher, published: [95.5, null]}
  KD: {run: method=kd, published: [90, 91]}
  DKD: {run: method=dkd, skip: [b]}
"""


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    (tmp_path / "configs" / "table").mkdir(parents=True)
    (tmp_path / "configs" / "table" / "two.yaml").write_text(TABLE)
    return tmp_path / "configs"


def test_a_table_is_read_from_run_directories(config_dir: Path, tmp_path: Path) -> None:
    catalogue = open_catalogue([config_dir])
    request = read_request(["two", f"output_dir={tmp_path}/out"])
    arms = chosen_arms(request, chosen_table(request, catalogue), catalogue)
    for arm, method in zip(arms, ("kd", "kd", "dkd"), strict=True):
        made = write_run(tmp_path / "made" / arm.row / arm.column, method, 0, 92.0)
        arm.directory.mkdir(parents=True)
        if arm.column == "a":
            made.directory.rename(arm.directory / "seed0")
        else:
            (arm.directory / "seed1").mkdir()
            (arm.directory / "seed1" / "error.txt").write_text("ValueError: no\n")
    results = results_of_table(request, catalogue)
    cells = results.cells
    assert (cells["KD", "a"].mean, cells["KD", "a"].n, cells["KD", "a"].wanted) == (92.0, 1, 2)
    assert cells["KD", "a"].difference == 2.0
    assert cells["Teacher", "a"].mean == 95.0
    assert cells["Teacher", "a"].difference == -0.5
    assert cells["DKD", "a"].test.n == 1
    assert cells["KD", "b"].missing == "failed"
    error = arms[1].directory / "seed1" / "error.txt"
    assert cells["KD", "b"].failures == {1: f"KD / b / seed 1 failed: ValueError: no ({error})"}
    assert cells["DKD", "b"].missing == "not run"
    # Of two seeds one has failed, or can no longer be read.
    (arms[0].directory / "seed1").mkdir()
    (arms[0].directory / "seed1" / "error.txt").write_text("MemoryError\n")
    (arms[2].directory / "seed1").mkdir()
    (arms[2].directory / "seed1" / "result.json").write_text('{"schema"')
    half = results_of_table(request, catalogue)
    assert [count(half.cells[row, "a"]) for row in half.rows] == ["1", *["1 of 2, 1 failed"] * 2]
    told = notes(half)
    assert f"KD / a / seed 1 failed: MemoryError ({arms[0].directory}/seed1/error.txt)" in told
    (unread,) = [note for note in told if note.startswith("DKD / a / seed 1 cannot be read: ")]
    assert f"{arms[2].directory}/seed1/result.json is damaged" in unread
    assert len(told) == len(set(told)), "the rows of one run tell its failure once"
    # What is shown of a table does not change what its rows are tested against.
    part = results_of_table(
        read_request([*["two", f"output_dir={tmp_path}/out"], "rows=DKD"]), catalogue
    )
    assert part.rows == ["DKD"]
    assert part.cells["DKD", "a"].test.n == 1


def test_directories_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        write_run(tmp_path, "kd", seed, 90.0 + seed)
        write_run(tmp_path, "dkd", seed, 92.0 + 2 * seed)
    assert kdrun(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "dkd            93.00 ± 1.41  2" in told
    out = tmp_path / "new" / "table.json"
    assert kdrun(["report", str(tmp_path), "format=json", f"out={out}", "baseline=dkd"]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [cell["baseline"] for cell in cells if cell["row"] == "kd"] == ["dkd"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["baseline=kdd"], "baseline=kdd: no such row (rows: teacher, student alone, kd)"),
        (["metric=loss"], "metric=loss: say which of its values are better"),
        (["metric=f1", "direction=max"], "no metric f1"),
        (["--html", "correction=holm"], "correction: a page has everything"),
    ],
)
def test_options_that_do_not_fit_the_runs(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    assert kdrun(["report", str(tmp_path), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_run_that_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, "kd")
    path = write_run(tmp_path, "dkd").directory / "result.json"
    path.write_text("")
    assert kdrun(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"left out: {path} is damaged" in told
    assert "\nkd  " in told and "\ndkd" not in told
    assert kdrun(["report", str(path.parent)]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["epoch=best"], ["rows=kd"]])
def test_the_page_of_one_run_has_no_options(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path)
    assert kdrun(["report", "--html", str(run.directory), *words]) == 2
    assert "a page has everything" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes the name of a table or directories"),
        (["digit"], "Did you mean the table digits"),
        (["digits", "format=html"], "no such format"),
        (["digits", "format=markdwn"], "Did you mean markdown"),
        (["digits", "metric=loss"], "the table digits says this itself"),
        (["digits", "."], "one at a time"),
        (["digits", "launcher=joblib"], "runs nothing"),
        ([".", "color=red"], "color=red: no such option"),
        (["digits", "--pdf"], "no such flag"),
        (["digits", "rows=X"], "no such row of digits"),
    ],
)
def test_mistakes_end_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kdrun(["report", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
