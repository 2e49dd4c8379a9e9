from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdrun.errors import UserError
from kdrun.report.runs import by_configuration, find_runs, labels, read_run

from .conftest import write_run


def test_runs_are_found_below_a_directory_and_nothing_else_is(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, seed=seed) for seed in (0, 1)]
    (tmp_path / "store" / "network" / "x").mkdir(parents=True)
    (tmp_path / "store" / "network" / "x" / "result.json").write_text("{}")
    (tmp_path / "digits" / "resnet20-resnet8" / "kd-00000000" / "seed2").mkdir()
    assert find_runs([tmp_path]) == [run.directory for run in runs]
    assert find_runs([runs[1].directory, tmp_path]) == [runs[1].directory, runs[0].directory]


def test_places_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="no such directory"):
        find_runs([tmp_path / "x"])


def test_values_of_networks_and_epochs(tmp_path: Path) -> None:
    run = write_run(tmp_path, accuracy=91.0)
    assert run.value("teacher", "accuracy", "best") == 95.0
    assert run.value("distilled", "accuracy", "last") == 91.0
    assert run.value("distilled", "accuracy", "best") == 92.0
    assert run.value("generator", "accuracy", "last") is None
    assert run.training_seconds("alone") == 10.0
    with pytest.raises(UserError, match=r"no metric f1 \(metrics: accuracy, loss, ece, "):
        run.value("alone", "f1", "last")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"names": {}}'])
def test_a_damaged_result_names_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("entry", "value", "told"),
    [
        ("schema", 2, "has the form 2 of another version of kdrun; this one reads 1"),
        ("names", ["kd"], "is damaged: names is no dict"),
        ("networks", None, "is damaged: networks is no dict"),
        ("seed", "0", "is damaged: seed is no int"),
    ],
)
def test_a_result_of_another_form_is_told(
    tmp_path: Path, entry: str, value: object, told: str
) -> None:
    directory = write_run(tmp_path).directory
    path = directory / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(UserError, match=told):
        read_run(directory)


def test_runs_behind_links_are_found_once(tmp_path: Path) -> None:
    """A folder of runs that was moved to a larger disk, and a link that leads in a circle."""
    run = write_run(tmp_path / "large")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "digits").symlink_to(tmp_path / "large" / "digits")
    (tmp_path / "outputs" / "again").symlink_to(tmp_path / "large" / "digits")
    (tmp_path / "large" / "digits" / "circle").symlink_to(tmp_path / "outputs")
    (found,) = find_runs([tmp_path / "outputs"])
    assert found.resolve() == run.directory.resolve()


def test_an_unfinished_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no finished run"):
        read_run(tmp_path)


def test_labels_tell_what_differs_and_no_more(tmp_path: Path) -> None:
    common = "training=smoke output_dir=x"
    runs = [
        write_run(tmp_path, "kd", words=f"{common} method.temperature=2", key="a1111111"),
        write_run(tmp_path, "kd", words=f"{common} method.temperature=4", key="a2222222"),
        write_run(tmp_path, "kd", words=common, key="b1111111", pair=("vgg8", "mlp")),
        write_run(tmp_path, "dkd", words=common, key="c1111111"),
        # The same words with other config files.
        write_run(tmp_path, "at", words=common, key="d1111111"),
        write_run(tmp_path, "at", words=common, key="d2222222"),
    ]
    groups = list(by_configuration(runs).values())
    assert labels(groups) == [
        ("kd method.temperature=2", "digits resnet20-resnet8"),
        ("kd method.temperature=4", "digits resnet20-resnet8"),
        ("kd", "digits vgg8-mlp"),
        ("dkd", "digits resnet20-resnet8"),
        ("at (d1111111)", "digits resnet20-resnet8"),
        ("at (d2222222)", "digits resnet20-resnet8"),
    ]


def test_seeds_come_together_in_order(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, seed=seed) for seed in (10, 2)]
    assert [[run.seed for run in g] for g in by_configuration(runs).values()] == [[2, 10]]


def test_one_word_in_two_spellings_is_no_difference(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path, words=f"teacher.allow_chance={spelt} method.temperature={n}", key=str(n)
        )
        for n, spelt in enumerate(("true", "True"))
    ]
    rows = [row for row, _ in labels(list(by_configuration(runs).values()))]
    assert rows == ["kd method.temperature=0", "kd method.temperature=1"]
