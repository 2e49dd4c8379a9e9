from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kdrun.cli import run as kdrun
from kdrun.report.runs import Run
from kdrun.report.sweeps import Trial

from .conftest import write_run
from .test_pages import NASTY, Elements, browse, in_a_browser
from .test_sweeps import sweep

pytest.importorskip("matplotlib")
from kdrun.report.sweep_page import drawings_of, sweep_page  # noqa: E402


def finished_run(folder: Path, number: int, size: int) -> Run:
    run = write_run(folder, f"m{number}", accuracy=80.0 + number)
    run.networks["distilled"]["parameters"] = size
    lines = ["epoch,loss,validation/accuracy"]
    lines += [f"{epoch},{1 / epoch},{40 + 10 * epoch + number}" for epoch in (1, 2, 3)]
    (run.directory / "metrics.csv").write_text("\n".join(lines))
    return run


def trial(number: int, run: Run | None, status: str = "done", error: str = "") -> Trial:
    words = (
        f"method={('kd', 'dkd')[number % 2]}",
        f"method.temperature={1.5**number}",
        f"student.hidden=[{8 * 2**number}]",
        f"name={NASTY}" if number % 2 else "name=plain",
    )
    objective = 75.0 + number if status in ("done", "pruned") else None
    directory = run.directory if run else None
    return Trial(number, words, status, objective, 3.0, error, run, directory)


@pytest.fixture
def trials(tmp_path: Path) -> list[Trial]:
    """Six that ended, one that was given up, one that failed; texts that break careless pages."""
    found = [trial(n, finished_run(tmp_path, n, 100 * (n + 1))) for n in range(6)]
    found.append(trial(6, None, "pruned", "given up after epoch 2"))
    return [*found, trial(7, None, "failed", f"ValueError: {NASTY}")]


def test_the_page_of_a_sweep_is_whole_and_escaped(trials: list[Trial], tmp_path: Path) -> None:
    page = sweep_page(tmp_path / NASTY.replace("/", "|"), trials)
    elements = Elements(page)
    assert {"best", "runs", "progress", "sensitivity", "failed", "provenance"} <= {*elements.ids}
    assert len(elements.ids) == len(set(elements.ids))
    # Progress, curves, size; and method, temperature, hidden, name.
    assert elements.tags["svg"] == 7
    assert elements.tags["script"] == 1 and elements.tags["img"] == elements.tags["link"] == 0
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "given up after epoch 2" in page


def test_the_best_comes_with_its_command(trials: list[Trial], tmp_path: Path) -> None:
    page = sweep_page(tmp_path, trials)
    best = page.partition('<section id="best">')[2].partition("</section>")[0]
    assert best.count("kdrun method=") == 3
    assert "method.temperature=7.59375" in best.partition("</pre>")[0]


def test_a_sweep_of_which_nothing_ended_has_a_page(tmp_path: Path) -> None:
    page = sweep_page(tmp_path, [trial(0, None, "failed", "no"), trial(1, None, "interrupted")])
    ids = Elements(page).ids
    assert "failed" in ids and "best" not in ids and "progress" not in ids
    assert drawings_of([], []) == {"progress": [], "sensitivity": []}


def test_options_with_too_many_words_are_not_drawn(tmp_path: Path) -> None:
    many = [Trial(n, (f"student=timm/net{n}",), "done", 80.0 + n, 1.0, "", None) for n in range(20)]
    assert drawings_of(many, ["student"])["sensitivity"] == []


def test_the_command_writes_the_page_beside_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = sweep(tmp_path)
    assert kdrun(["report", str(directory), "--html"]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    assert "Sweep of 2 runs" in (directory / "report.html").read_text()


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_runs_can_be_sorted_and_filtered(trials: list[Trial], tmp_path: Path, width: int) -> None:
    page = sweep_page(tmp_path, trials).replace('id="trials"', 'id="cells"')
    told = browse(page, tmp_path, f"--window-size={width},900")
    assert told["overflow"] == 0
    assert told["alerts"] is False
    assert told["all"] == 8


def test_runs_whose_validation_is_never_a_number_have_no_curve(tmp_path: Path) -> None:
    trials = []
    for number in range(3):
        run = finished_run(tmp_path, number, 1000)
        if number < 2:
            lines = "epoch,loss,validation/accuracy\n1,1,nan\n2,1,nan\n"
            (run.directory / "metrics.csv").write_text(lines)
        trials.append(replace(trial(number, run), directory=run.directory))
    assert sweep_page(tmp_path, trials)
    assert sweep_page(tmp_path, trials[:2])


def test_small_results_are_told_apart(tmp_path: Path) -> None:
    trials = [replace(trial(n, None), objective=0.311 + n / 1000) for n in range(2)]
    page = sweep_page(tmp_path, trials)
    assert ">0.3110<" in page and ">0.3120<" in page
    assert "none of its results was found: larger ones" in page


def test_runs_of_one_epoch_are_points(tmp_path: Path) -> None:
    trials = []
    for number in range(2):
        run = finished_run(tmp_path, number, 1000)
        (run.directory / "metrics.csv").write_text("epoch,loss,validation/accuracy\n1,1,80\n")
        trials.append(replace(trial(number, run), directory=run.directory))
    (curves,) = [d.svg for d in drawings_of(trials, [])["progress"] if "over epochs" in d.svg]
    assert "<use " in curves, "a mark"
    assert ">1</text>" in curves and "0.9" not in "".join(re.findall(r"<text.*?</text>", curves))
