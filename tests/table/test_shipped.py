"""The tables that come with kdrun: each is right, and its numbers are those of the literature."""

from __future__ import annotations

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.table.cells import arm_of, layers, merge, plan
from kdrun.table.config import Table, open_table

CATALOGUE = open_catalogue()
NAMES = CATALOGUE.choices("table")


def composed(table: Table, row: str, column: str, profile: str | None = None) -> dict:
    """The configuration of a cell."""
    place = next(found for found in table.columns if found.label == column)
    return compose(merge(layers(table, table.row(row), place, profile)), CATALOGUE).values


@pytest.mark.parametrize("name", NAMES)
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
    assert "method=kd" in table.row(table.baseline).words
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


def test_a_metric_of_the_same_runs_costs_nothing() -> None:
    imagenet = open_table("imagenet", CATALOGUE)
    one, five = (composed(imagenet, "DKD", f"R50-MV1{end}") for end in ("", " top-5"))
    assert one == five
