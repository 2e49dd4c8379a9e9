from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.cli import run as kdrun
from kdrun.config import compose
from kdrun.identity import run_directory
from kdrun.report.sweeps import Trial, is_sweep, pareto, text, varied_options

from .conftest import write_run


def trial(number: int, objective: float | None, run=None, status: str = "done", **options) -> Trial:
    words = ("method=kd", *(f"method.{name}={value}" for name, value in options.items()))
    error = "ValueError: no" if status == "failed" else ""
    return Trial(number, words, status, objective, 12.0, error, run)


def test_the_best_come_first_with_their_commands() -> None:
    trials = [trial(n, 90.0 + n, temperature=n) for n in range(4)]
    trials.append(trial(4, None, status="failed", temperature=9))
    lines = text(Path("s"), trials).splitlines()
    assert lines[0] == "sweep s: 5 runs, 4 done, 1 failed"
    assert [line.split()[:3] for line in lines[3:7]] == [
        ["1", "#3", "3"], ["2", "#2", "2"], ["3", "#1", "1"], ["4", "#0", "0"]
    ]  # fmt: skip
    best = lines.index("best")
    assert lines[best + 1] == "  kdrun method=kd method.temperature=3"
    assert any(line.split() == ["method.temperature", "+1.00", "0.083", "4"] for line in lines)
    failed = lines.index("failed")
    assert lines[failed + 1 :] == [
        "  #4 ValueError: no",
        "     kdrun method=kd method.temperature=9",
    ]


def test_only_what_varies_is_listed() -> None:
    trials = [trial(0, 1.0, temperature=1, weight=2), trial(1, 1.0, temperature=2, weight=2)]
    assert varied_options(trials) == ["method.temperature"]


def test_what_nothing_beats_in_result_and_size() -> None:
    class Sized(Trial):
        @property
        def size(self) -> int:
            return self.number

    sized = [Sized(n, (), "done", value, 1.0, "") for n, value in
             [(10, 90.0), (20, 95.0), (30, 94.0), (40, 96.0), (40, 95.5)]]  # fmt: skip
    assert [t.number for t in pareto(sized, "max")] == [10, 20, 40]
    assert [t.objective for t in pareto(sized, "max")] == [90.0, 95.0, 96.0]
    assert [t.objective for t in pareto(sized, "min")] == [90.0]


def test_a_sweep_without_a_single_result_says_so() -> None:
    told = text(Path("s"), [trial(0, None, status="failed"), trial(1, None, status="interrupted")])
    assert told.startswith("sweep s: 2 runs, 1 failed, 1 interrupted")
    assert "best" not in told


def sweep(output_dir: Path) -> Path:
    """A sweep of two runs, with a record of each and the result of one."""
    directory = output_dir / "sweeps" / "now"
    (directory / "jobs").mkdir(parents=True)
    for number, temperature in enumerate((2, 3)):
        words = ["method=kd", f"method.temperature={temperature}", f"output_dir={output_dir}"]
        record = {"number": number, "words": words, "status": "done", "began": 1.0}
        record |= {"seconds": 3.0, "objective": 80.0 + number, "error": "", "trace": ""}
        (directory / "jobs" / f"{number}.json").write_text(json.dumps(record))
    return directory


def test_a_sweep_finds_the_results_of_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = sweep(tmp_path)
    assert is_sweep(directory) and not is_sweep(tmp_path)
    words = ["method=kd", "method.temperature=3", f"output_dir={tmp_path}"]
    config = compose(words, open_catalogue())
    place = run_directory(config.values, config.names)
    place.parent.mkdir(parents=True)
    write_run(tmp_path / "made", "kd", accuracy=81.0).directory.rename(place)
    assert kdrun(["report", str(directory)]) == 0
    told = capsys.readouterr().out
    best = next(line.split() for line in told.splitlines() if " #1 " in line)
    assert best == ["1", "#1", "3", "81.0000", "82.0000", "1,000", "3", "s"]
    assert "80.0000" in next(line for line in told.splitlines() if " #0 " in line)
    assert kdrun(["report", str(directory), "format=json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["mean"] for cell in cells if cell["row"] == "kd"] == [81.0]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"colour": 1}'])
def test_a_damaged_record_names_its_file(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = sweep(tmp_path)
    (directory / "jobs" / "0.json").write_text(content)
    assert kdrun(["report", str(directory)]) == 2
    assert "0.json is damaged" in capsys.readouterr().err


def test_only_a_sweep_by_itself_is_shown_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = sweep(tmp_path)
    write_run(tmp_path / "other")
    assert kdrun(["report", str(directory), str(tmp_path / "other")]) == 0
    assert "sweep" not in capsys.readouterr().out.splitlines()[1]
    assert kdrun(["report", str(directory), "colour=red"]) == 2
    assert "colour=red: no such option" in capsys.readouterr().err
