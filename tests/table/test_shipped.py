"""The tables that come with kdrun: each is right, and its numbers are those of the literature."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.cli import run as kdrun
from kdrun.config import compose
from kdrun.table.cells import arm_of, layers, merge, plan
from kdrun.table.config import Table, open_table

CATALOGUE = open_catalogue()
NAMES = CATALOGUE.choices("table")


PLAIN = {
    "method=kd",
    "method.mode=glnn",  # node by node, on graphs
    "method.divergence=forward_kl",  # token by token
}
"""What the baseline of a table is: plain distillation."""


def composed(table: Table, row: str, column: str, profile: str | None = None) -> dict:
    """The configuration of a cell."""
    place = next(found for found in table.columns if found.label == column)
    return compose(merge(layers(table, table.row(row), place, profile)), CATALOGUE).values


LARGE = {"bdkd", "cifar100_cross", "cifar100_same", "ofa"}
"""Tables of which only the long test looks at more than the first run."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE])
def test_every_row_and_column_is_valid(name: str) -> None:
    """All rows in the first column, all columns in the first row, and whatever has extras."""
    table = open_table(name, CATALOGUE)
    runs = [row for row in table.rows if row.words is not None]
    for row in runs:
        for column in table.columns:
            first = row is runs[0] or column is table.columns[0]
            if (first or column.label in row.extra) and column.label not in row.skip:
                composed(table, row.label, column.label)
    for column in table.columns:
        composed(table, runs[0].label, column.label, "smoke")


@pytest.mark.parametrize("name", sorted(LARGE))
def test_the_first_run_of_a_large_table_is_valid(name: str) -> None:
    table = open_table(name, CATALOGUE)
    row = next(row for row in table.rows if row.words is not None)
    for profile in (None, "smoke"):
        composed(table, row.label, table.columns[0].label, profile)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_valid(name: str) -> None:
    table = open_table(name, CATALOGUE)
    for profile in (None, *table.profiles):
        assert plan(table, CATALOGUE, profile=profile)


@pytest.mark.parametrize("name", NAMES)
def test_teacher_student_and_plain_distillation_are_always_there(name: str) -> None:
    table = open_table(name, CATALOGUE)
    assert {row.network for row in table.rows} >= {"teacher", "alone"}
    assert PLAIN & set(table.row(table.baseline).words)
    assert "smoke" in table.profiles
    assert all(row.source for row in table.rows if row.published)


def test_pairs_have_their_own_settings() -> None:
    same, cross = (open_table(f"cifar100_{kind}", CATALOGUE) for kind in ("same", "cross"))
    assert composed(same, "DKD", "R56-R20")["method"]["beta"] == 2
    assert composed(same, "DKD", "R32x4-R8x4")["method"]["beta"] == 8
    mlld = composed(same, "MLLD", "R56-R20")["training"]
    assert (mlld["epochs"], mlld["teacher"]["epochs"]) == (480, 240)
    mobile = composed(cross, "KD", "VGG13-MNV2")["training"]
    assert mobile["optimizer"]["lr"] == 0.01
    assert mobile["teacher"]["optimizer"]["lr"] == 0.05


CONSTANTS = {
    ("cifar100_same", "DKD"): {
        **dict.fromkeys(("R56-R20", "R110-R32"), {"beta": 2}),
        **dict.fromkeys(("WRN40-2-WRN16-2", "WRN40-2-WRN40-1", "VGG13-VGG8"), {"beta": 6}),
        **dict.fromkeys(("R32x4-R8x4", "R110-R20"), {"beta": 8}),
    },
    ("cifar100_cross", "DKD"): {
        "VGG13-MNV2": {"beta": 6},
        **dict.fromkeys(
            ("R32x4-SNV1", "WRN40-2-SNV1", "R50-MNV2", "R32x4-SNV2", "R50-VGG8"), {"beta": 8}
        ),
    },
    ("imagenet", "DKD"): {
        "R34-R18": {"beta": 0.5, "temperature": 1, "warmup_epochs": 1},
        "R50-MV1": {"beta": 2, "temperature": 1, "warmup_epochs": 1},
    },
    ("cifar100_same", "CAT-KD"): {
        "R32x4-R8x4": {"weight": 15, "resolution": 2, "normalize": False},
        "R56-R20": {"weight": 0.7, "resolution": 2, "normalize": False},
        "R110-R32": {"weight": 1.8, "resolution": 2, "normalize": False},
        "WRN40-2-WRN16-2": {"weight": 12, "resolution": 2, "normalize": False},
        "WRN40-2-WRN40-1": {"weight": 1.5, "resolution": 2, "normalize": False},
        "VGG13-VGG8": {"weight": 4.5, "resolution": 2, "normalize": False},
    },
    ("cifar100_cross", "CAT-KD"): {
        "R32x4-SNV1": {"weight": 600, "resolution": 4, "normalize": True},
        "R32x4-SNV2": {"weight": 600, "resolution": 4, "normalize": True},
        "WRN40-2-SNV1": {"weight": 80, "resolution": 4, "normalize": True},
        "R50-MNV2": {"weight": 40, "resolution": 2, "normalize": True},
        "VGG13-MNV2": {"weight": 15, "resolution": 2, "normalize": True},
    },
    ("cifar100_same", "ReviewKD"): {"R32x4-R8x4": {"weight": 5}, "R56-R20": {"weight": 1}},
    ("imagenet", "ReviewKD"): {
        "R34-R18": {"weight": 1, "warmup_epochs": 1, "student_preactivation": True},
        "R50-MV1": {"weight": 8, "warmup_epochs": 1, "student_preactivation": True},
    },
    ("imagenet", "OFD"): {"R34-R18": {"weight": 1e-3}, "R50-MV1": {"weight": 1e-4}},
}
"""What the papers choose for each pair, by table and row, then by column."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), CONSTANTS)
def test_every_constant_of_a_pair_is_the_papers(name: str, row: str) -> None:
    table = open_table(name, CATALOGUE)
    for column, constants in CONSTANTS[name, row].items():
        method = composed(table, row, column)["method"]
        assert {key: method[key] for key in constants} == constants, column


def test_teachers_are_shared_between_students_and_tables() -> None:
    same, cross = (open_table(f"cifar100_{kind}", CATALOGUE) for kind in ("same", "cross"))

    def teacher(table: Table, row: str, column: str) -> str:
        place = next(found for found in table.columns if found.label == column)
        words = merge(layers(table, table.row(row), place, None))
        return arm_of(row, column, words, compose(words, CATALOGUE)).teacher

    assert teacher(same, "KD", "R110-R32") == teacher(same, "MLLD", "R110-R20")
    assert teacher(same, "KD", "VGG13-VGG8") == teacher(cross, "KD", "VGG13-MNV2")


def test_published_numbers_are_those_of_the_literature() -> None:
    same = open_table("cifar100_same", CATALOGUE)
    assert same.row("KD").published["R32x4-R8x4"] == 73.33
    assert same.row("DKD").published["R32x4-R8x4"] == 76.32
    assert same.row("MLLD+LS").published["R32x4-R8x4"] == 78.28
    assert "R110-R20" not in same.row("ReviewKD").published
    imagenet = open_table("imagenet", CATALOGUE)
    assert imagenet.row("DKD").published == {
        "R34-R18": 71.70,
        "R34-R18 top-5": 90.41,
        "R50-MV1": 72.05,
        "R50-MV1 top-5": 91.05,
    }


def test_inputs_of_mixer_are_normalised_as_for_its_weights() -> None:
    table = open_table("ofa_imagenet", CATALOGUE)
    for column in table.columns:
        dataset = composed(table, "KD", column.label)["dataset"]
        expected = [0.5] * 3 if column.label.startswith("Mixer-B") else [0.485, 0.456, 0.406]
        assert dataset["mean"] == expected, column.label
    assert composed(table, "KD", "Mixer-B-R18", "smoke")["dataset"]["mean"][0] == 0.5071


def test_a_metric_of_the_same_runs_costs_nothing() -> None:
    imagenet = open_table("imagenet", CATALOGUE)
    one, five = (composed(imagenet, "DKD", f"R50-MV1{end}") for end in ("", " top-5"))
    assert one == five


def test_the_64_students_have_their_published_accuracies() -> None:
    diswot = open_table("diswot", CATALOGUE)
    alone, distilled = (diswot.row(row).published for row in ("Student alone", "KD"))
    assert len(alone) == len(distilled) == 64
    assert (alone["557"], distilled["557"]) == (71.93, 74.86)
    assert max(distilled, key=distilled.__getitem__) == "557"
    assert max(alone, key=alone.__getitem__) == "777"
    blocks = composed(diswot, "KD", "357")["student"]["blocks"]
    assert blocks == [3, 5, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part", "runs"),
    [
        ("digits", ["seeds=1"], 6),
        ("taid", ["rows=KL,TAID", "columns=GPT-2 mini-nano", "seeds=1"], 2),
    ],
)
def test_tables_that_need_no_download_run_shrunken(
    name: str, part: list[str], runs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["table", name, "profile=smoke", *part, "trainer=cpu", f"output_dir={tmp_path}"]
    assert kdrun(words) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    assert f"{runs} runs, {runs} done" in told
    assert "profile=smoke: shrunken runs" in told
    folder = tmp_path / "tables" / f"{name}-smoke"
    written = {path.name for path in folder.iterdir()}
    assert written >= {"table.txt", "table.md", "table.csv", "table.tex", "table.json"}
    for path in folder.iterdir():
        assert "smoke" in path.read_text(), f"{path.name} is not labelled"
