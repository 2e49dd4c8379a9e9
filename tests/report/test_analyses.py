from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from kdrun.cli import run as kdrun
from kdrun.errors import UserError
from kdrun.report.analyses import correlation_text, paired_text
from kdrun.report.results import results_of_runs
from kdrun.report.runs import Run
from kdrun.report.statistics import bootstrap

from .conftest import write_run

KD = [90.0, 91.0, 89.5, 90.5, 92.0, 90.0]
DKD = [91.0, 91.5, 91.0, 91.5, 92.5, 92.0]


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    found = []
    for method, values in (("kd", KD), ("dkd", DKD)):
        found += [write_run(tmp_path, method, seed, value) for seed, value in enumerate(values)]
    for number, run in enumerate(found):
        run.networks["distilled"]["test_last"]["agreement"] = 80.0 + number**2
    return found


def test_against_the_baseline_by_hand(runs: list[Run]) -> None:
    line = next(
        line.split()
        for line in paired_text(results_of_runs(runs, title="t")).splitlines()
        if line.startswith("dkd")
    )
    differences = [b - a for a, b in zip(KD, DKD, strict=True)]
    interval = bootstrap(differences)
    assert line[:4] == ["dkd", "kd", "6", "+1.0833"]
    assert [line[4], line[6]] == [f"{interval.low:+.4f}", f"{interval.high:+.4f}"]
    assert line[7] == f"{stats.ttest_1samp(differences, 0).pvalue:.3f}"
    assert line[8] == f"{stats.wilcoxon(differences).pvalue:.3f}"


def test_the_correction_is_over_all_cells(runs: list[Run], tmp_path: Path) -> None:
    results = results_of_runs(runs, title="t")
    plain, corrected = paired_text(results), paired_text(results, corrected=True)
    assert "not corrected" in plain and "after Holm's correction" in corrected

    def p(text: str) -> float:
        return float(next(row.split()[7] for row in text.splitlines() if row.startswith("dkd")))

    # The student alone is compared too: two tests.
    assert p(corrected) == pytest.approx(2 * p(plain), abs=2e-3)


def test_correlations_are_those_of_scipy(runs: list[Run]) -> None:
    text = correlation_text(results_of_runs(runs, title="t"))
    line = next(line.split() for line in text.splitlines() if line.startswith("agreement"))
    x, y = [*KD, *DKD], [80.0 + number**2 for number in range(12)]
    assert line[1:3] == ["12", f"{stats.spearmanr(x, y).statistic:+.3f}"]
    assert f"{stats.pearsonr(x, y).statistic:+.3f}" in line
    # What never varies correlates with nothing and is left out.
    assert not any(row.startswith("ece") for row in text.splitlines())


def test_too_few_runs_are_told(tmp_path: Path) -> None:
    results = results_of_runs([write_run(tmp_path), write_run(tmp_path, "dkd")], title="t")
    with pytest.raises(UserError, match="no row shares two seeds"):
        paired_text(results)
    with pytest.raises(UserError, match="no column has three runs"):
        correlation_text(results)


def test_from_the_command_line(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kdrun(["report", str(tmp_path), "analysis=paired", "correction=holm"]) == 0
    assert "after Holm's correction" in capsys.readouterr().out
    assert kdrun(["report", str(tmp_path), "analysis=correlation"]) == 0
    assert "every seed a point" in capsys.readouterr().out
    assert kdrun(["report", str(tmp_path), "analysis=pared"]) == 2
    assert "Did you mean paired?" in capsys.readouterr().err
