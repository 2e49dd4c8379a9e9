from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kdrun.report.formats import FORMATS
from kdrun.report.results import measured, results_of_runs
from kdrun.report.runs import find_runs, read_runs

from .conftest import write_run


def both_methods(root: Path) -> list:
    """kd 90, 91, 92 and dkd 91, 93, 95 over three seeds."""
    runs = [write_run(root, "kd", seed, 90.0 + seed) for seed in range(3)]
    return runs + [write_run(root, "dkd", seed, 91.0 + 2 * seed) for seed in range(3)]


def test_means_deviations_and_tests(tmp_path: Path) -> None:
    results = results_of_runs(both_methods(tmp_path), title="t")
    assert results.rows == ["teacher", "student alone", "kd", "dkd"]
    [column] = results.columns
    dkd = results.cells["dkd", column]
    assert (dkd.mean, dkd.std, dkd.n) == (93.0, 2.0, 3)
    # Differences 1, 2, 3 as in the test of the statistics.
    assert dkd.test.estimate == 2.0
    assert dkd.test.p_value == pytest.approx(0.0741799, abs=1e-6)
    # The student alone differs from kd by 2 for every seed, which decides nothing: one test.
    assert results.cells["student alone", column].test.p_value is None
    assert dkd.adjusted == dkd.test.p_value
    assert results.cells["kd", column].test is None
    assert dkd.seconds == 21.0
    assert results.best[column] == 93.0


def test_a_shared_teacher_counts_once_and_students_per_seed(tmp_path: Path) -> None:
    results = results_of_runs(both_methods(tmp_path), title="t")
    [column] = results.columns
    assert results.cells["teacher", column].n == 1
    assert results.cells["student alone", column].n == 3
    assert results.cells["student alone", column].mean == 89.0


def test_networks_that_are_not_shared_are_not_mixed(tmp_path: Path) -> None:
    runs = both_methods(tmp_path)
    runs.append(write_run(tmp_path, "at", 0, 80.0, alone="network/other"))
    results = results_of_runs(runs, title="t")
    [column] = results.columns
    assert results.cells["student alone", column].missing == "several"
    assert results.cells["student alone", column].mean is None
    assert results.cells["teacher", column].n == 1


def test_a_teacher_that_learns_along_counts_in_every_run(tmp_path: Path) -> None:
    runs = both_methods(tmp_path)
    own = [write_run(tmp_path, "bdkd", seed, 90.0) for seed in range(2)]
    for run in own:
        (run.directory / "teacher.safetensors").touch()
    entry = replace(results_of_runs(own, title="t").entries[0], values={}, runs=())
    assert measured(entry, own, "last").n == 2
    assert results_of_runs(own, title="t").entries[0].n == 2
    # It is no reference of the others, whose teacher stays as it was.
    results = results_of_runs([*own, *runs], title="t")
    [column] = results.columns
    shown = results.cells["teacher", column]
    assert (shown.n, shown.runs[0].names["method"]) == (1, "kd")


def test_rows_of_a_method_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for key, value in zip("abc", (16, 2, 8), strict=True):
        write_run(tmp_path, words=f"method.temperature={value} trainer.progress=off", key=key)
    runs, _ = read_runs(find_runs([tmp_path]))
    rows = [f"kd method.temperature={value}" for value in (2, 8, 16)]
    assert list(results_of_runs(runs, title="t").rows)[2:] == rows


def test_a_result_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "at", accuracy=math.nan), write_run(tmp_path, "kd", accuracy=90.0)]
    results = results_of_runs(runs, title="t")
    assert results.best[results.columns[0]] == 90.0


def test_output_directories_share_their_configurations(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", seed=seed, accuracy=90.0 + seed) for seed in (0, 1)]
    runs += [write_run(tmp_path / "b", seed=seed, accuracy=90.0 + seed) for seed in (1, 2)]
    results = results_of_runs(runs, title="t")
    [column] = results.columns
    assert results.cells["kd", column].values == {0: 90.0, 1: 91.0, 2: 92.0}
    assert len(results.cells["kd", column].runs) == 3


def test_what_was_not_run_is_missing(tmp_path: Path) -> None:
    runs = both_methods(tmp_path)
    runs.append(write_run(tmp_path, "kd", 0, 70.0, pair=("vgg13", "vgg8")))
    results = results_of_runs(runs, title="t")
    entry = results.cells["dkd", "digits vgg13-vgg8"]
    assert (entry.missing, entry.mean, entry.n, entry.test) == ("missing", None, 0, None)


def test_metric_epoch_and_baseline_can_be_chosen(tmp_path: Path) -> None:
    runs = both_methods(tmp_path)
    results = results_of_runs(
        runs,
        title="t",
        metric="loss",
        direction="min",
        epoch="best",
        baseline="dkd",
        test="wilcoxon",
    )
    [column] = results.columns
    assert results.cells["kd", column].mean == pytest.approx(0.1)
    assert results.cells["kd", column].baseline == "dkd"
    assert results.best[column] == pytest.approx(0.1)


def test_a_diverged_run_stays_visible(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "kd", seed, 90.0 + seed) for seed in range(3)]
    runs += [write_run(tmp_path, "dkd", seed, float("nan")) for seed in range(3)]
    results = results_of_runs(runs, title="t")
    assert "nan" in FORMATS["text"](results)
    assert "NaN" not in FORMATS["json"](results)
    assert results.cells["dkd", results.columns[0]].test.p_value is None


@pytest.mark.slow
@pytest.mark.parametrize("methods", [400, 10_000])
def test_ten_thousand_runs_within_seconds(tmp_path: Path, methods: int) -> None:
    for method in range(methods):
        for seed in range(10_000 // methods):
            write_run(tmp_path, f"m{method}", seed, 90.0 + method / 1e4 + seed % 7, key="a")
    began = time.perf_counter()
    runs, _ = read_runs(find_runs([tmp_path]))
    results = results_of_runs(runs, title="t", baseline="m0")
    written = {name: write(results) for name, write in FORMATS.items()}
    seconds = time.perf_counter() - began
    assert len(runs) == 10_000
    assert written["text"].count("\n") > 400
    print(f"10,000 runs in {seconds:.1f} s")
    assert seconds < 10
