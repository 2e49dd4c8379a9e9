from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from kdrun.catalogue import Catalogue, open_catalogue
from kdrun.cli import run as kdrun
from kdrun.errors import UserError
from kdrun.table.request import chosen_arms, chosen_table, read_request, wanted_rows


def test_words_of_a_table() -> None:
    request = read_request(
        ["small", "--dry-run", "profile=tiny", "seeds=[3,5]", "rows=KD,DKD", "columns=[a-b]"]
        + ["fail_fast=true", "workers=3", "launcher=joblib", "launcher.n_jobs=3", "trainer=cpu"]
        + ["output_dir=/tmp/x"]
    )
    assert request.dry_run and request.fail_fast
    assert (request.profile, request.seeds, request.workers) == ("tiny", (3, 5), 3)
    assert (request.rows, request.columns) == ("KD,DKD", "[a-b]")
    assert request.launcher == ["launcher=joblib", "launcher.n_jobs=3"]
    assert request.overrides == ["trainer=cpu", "output_dir=/tmp/x"]
    assert request.folder == Path("/tmp/x/tables/small-tiny")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("KD", ["KD"]),
        ("OFA, logits alone", ["OFA, logits alone"]),
        ("[OFA,logits alone]", ["OFA, logits alone"]),
        ("OFA, logits alone,KD,OFA", ["KD", "OFA", "OFA, logits alone"]),
    ],
)
def test_labels_may_have_commas(typed: str, found: list[str]) -> None:
    catalogue = open_catalogue()
    request = read_request(["ofa", f"rows={typed}"])
    assert wanted_rows(request, chosen_table(request, catalogue)) == found


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("[3]", (3,)), ("1,4", (1, 4)), ("[0]", (0,))]
)
def test_seeds_are_a_number_or_a_list(text: str, seeds: tuple[int, ...]) -> None:
    assert read_request(["small", f"seeds={text}"]).seeds == seeds


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seeds=0", "seeds=0: must be"),
        ("seeds=x", "seeds=x: must be"),
        ("seeds=1,1", "must be"),
        ("seed=1", r"write seeds=3 or seeds=\[1\]"),
        ("fail_fast=yes", "must be true or false"),
        ("workers=0", "workers=0: must be"),
        ("--html", "no such flag"),
        ("smoke", "'=' is missing"),
    ],
)
def test_wrong_words_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_request(["small", word])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("profile=tin", "no such profile of small. Did you mean tiny"),
        ("rows=DK", "no such row of small. Did you mean"),
        ("columns=cnn", r"no such column of small.* \(columns: cnn-mlp, cnn-cnn\)"),
    ],
)
def test_unknown_names_list_what_there_is(catalogue: Catalogue, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen_table(read_request(["small", word]), catalogue)


def test_a_row_read_from_others_stands_for_their_runs(catalogue: Catalogue, tmp_path: Path) -> None:
    request = read_request(["small", "rows=Teacher", "columns=cnn-mlp", f"output_dir={tmp_path}"])
    arms = chosen_arms(request, chosen_table(request, catalogue), catalogue)
    assert [(arm.row, arm.column) for arm in arms] == [("KD", "cnn-mlp")]


def test_a_dry_run_lists_costs_and_runs_nothing(
    config_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config-dir", str(config_dir), "table", "small", "--dry-run"]
    assert kdrun([*words, f"output_dir={tmp_path}/out"]) == 0
    told = capsys.readouterr().out
    assert "10 runs: 10 missing" in told
    assert "teacher 1, alone 4, distil 10" in told
    assert "0:missing 1:missing" in told
    assert not list((tmp_path / "out").glob("digits"))


def test_a_table_from_configs_to_results(
    config_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three runs of tiny networks; one of them fails, is named, and mended by the next command."""
    out = tmp_path / "out"
    table = ["--config-dir", str(config_dir), "table", "small", f"output_dir={out}"]
    part = ["columns=cnn-mlp", "seeds=1", "trainer=cpu"]
    # A directory stands where one run wants to write a file: it can only fail.
    request = read_request(["small", f"output_dir={out}", *part])
    catalogue = open_catalogue([config_dir])
    arms = chosen_arms(request, chosen_table(request, catalogue), catalogue)
    broken = next(arm for arm in arms if arm.row == "DKD").directory / "seed0"
    broken.mkdir(parents=True)
    (broken / "metrics.csv").mkdir()

    assert kdrun([*table, *part]) == 1
    told = capsys.readouterr().out
    assert "3 runs, 2 done, 1 failed" in told
    assert "DKD / cnn-mlp / seed 0 failed: " in told
    command = next(line for line in told.splitlines() if line.startswith("    kdrun"))
    assert (broken / "error.txt").read_text().startswith("cannot write")

    (broken / "metrics.csv").rmdir()
    assert kdrun(shlex.split(command)[1:]) == 0
    capsys.readouterr()
    assert kdrun([*table, *part]) == 0
    assert "3 runs, 3 done" in capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in out.glob("digits/*/*/seed0/result.json")]
    assert {result["names"]["method"] for result in results} == {"kd", "dkd", "sinkhorn"}
    assert len({result["artefacts"]["teacher"] for result in results}) == 1
