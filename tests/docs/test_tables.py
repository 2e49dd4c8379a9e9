"""docs/tables.md against the code it describes."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from kdrun.catalogue import load_yaml, open_catalogue
from kdrun.report.command import CHOICES, FREE
from kdrun.search import OBJECTIVES
from kdrun.table.config import ColumnFile, ProfileFile, RowFile, TableFile
from kdrun.table.request import read_request
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")


def rows_after(text: str) -> list[list[str]]:
    """The rows of the first table below a line."""
    after = PAGE.partition(text)[2]
    table = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert table, f"no table after: {text}"
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Of the file:", TableFile),
        ("Of a column:", ColumnFile),
        ("Of a row:", RowFile),
        ("Of a profile:", ProfileFile),
    ],
)
def test_the_entries_of_a_table(text: str, kind: type) -> None:
    documented = [name for row in rows_after(text) for name in names(row[0])]
    assert sorted(documented) == sorted(field.name for field in fields(kind))


def test_the_words_of_a_table_are_read() -> None:
    words = [name for row in rows_after("exit status is 1") for name in names(row[0])]
    assert words[-2:] == ["--dry-run", "<key>=<value>"]
    typed = {"seeds": "[3,5]", "rows": "KD", "columns": "a", "profile": "smoke"}
    typed |= {"fail_fast": "true", "launcher": "joblib", "workers": "2"}
    assert set(words[:-2]) == set(typed)
    request = read_request(["digits", "--dry-run", *(f"{k}={v}" for k, v in typed.items())])
    assert request.overrides == [] and request.seeds == (3, 5)


def test_the_options_of_reports() -> None:
    found = {names(row[0])[0]: names(row[1]) for row in rows_after("## Reports")}
    assert set(found) == {*CHOICES, "out"}
    assert set(FREE) == {"out", "metric", "baseline"}
    for option, values in CHOICES.items():
        assert set(values) <= set(found[option]), option
    analyses = [names(row[0])[0] for row in rows_after("| `out` |")]
    assert analyses == list(CHOICES["analysis"])


def test_the_objectives_of_searches() -> None:
    found = {names(row[0])[0]: row[1] for row in rows_after("`objectives` says")}
    assert found == OBJECTIVES


def test_the_sweeps_that_are_there() -> None:
    catalogue = open_catalogue()
    found = rows_after("What is typed beside it wins")
    assert {names(row[0])[0] for row in found} == set(catalogue.choices("sweep"))
    for row in found:
        name, *words = (name for cell in row for name in names(cell))
        run = load_yaml(catalogue.path("sweep", name))["run"]
        for word in " ".join(words).split():
            assert word in run.split(), f"{name}: {word}"
