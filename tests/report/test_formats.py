from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kdrun.report.formats import FORMATS, as_csv, as_json, latex, markdown, text
from kdrun.report.results import NOT_RUN, Entry, Results, compared


@pytest.fixture
def results() -> Results:
    """Two columns; KD as baseline; something published, missing and left out."""

    def entry(row: str, column: str, *values: float, **more: object) -> Entry:
        network = "teacher" if row == "Teacher" else "distilled"
        missing = "" if values else "missing"
        blank = Entry(row, column, network, "accuracy", "max", dict(enumerate(values)), 3, missing)
        return replace(blank, **{"baseline": "KD", **more})

    entries = [
        entry("Teacher", "A_1", 75.0, wanted=None, baseline="", seconds=3700.0),
        entry("KD", "A_1", 70.0, 71.0, 72.0, published=70.66, source="the paper", seconds=65.0),
        entry("D|KD", "A_1", 71.0, 73.0, 75.0, published=71.97, source="the paper"),
        entry("Teacher", "B", wanted=None, baseline=""),
        entry("KD", "B", 0.5, 0.75),
        replace(entry("D|KD", "B"), missing=NOT_RUN),
    ]
    return Results(
        title="t<1>",
        description="Numbers & such.",
        rows=["Teacher", "KD", "D|KD"],
        columns=["A_1", "B"],
        entries=compared(entries),
        epoch="last",
        profile="smoke",
    )


TEXT = """\
t<1>: Numbers & such.
profile=smoke: shrunken runs that only show that everything works; not results
test accuracy (larger is better): mean ± standard deviation over n runs; weights of the last epoch
p: paired t-test over seeds, two-sided, not corrected; ?: cannot be decided
published: the paper

A_1
             accuracy  n  published  difference  p against KD  trained in
Teacher         75.00  1                                          1:01:40
KD       71.00 ± 1.00  3      70.66       +0.34                      1:05
D|KD     73.00 ± 2.00  3      71.97       +1.03         0.074

B
                accuracy       n  trained in
Teacher          missing
KD       0.6250 ± 0.1768  2 of 3
D|KD                   –
"""


def test_text(results: Results) -> None:
    assert text(results) + "\n" == TEXT


def test_markdown_has_overview_and_details(results: Results) -> None:
    lines = markdown(results).splitlines()
    assert lines[0] == "# t\\<1>: Numbers & such."
    assert "| D\\|KD | **73.00 ± 2.00** (3) [71.97] | – |" in lines
    assert "| Teacher | 75.00 (1) | missing |" in lines
    assert "| A_1 | D\\|KD | 73.00 ± 2.00 | 3 | 71.97 | +1.03 | 0.074 |  |" in lines
    assert all(line.count("|") - line.count("\\|") in (0, 4, 9) for line in lines)


def test_latex_is_booktabs_and_escaped(results: Results) -> None:
    written = latex(results)
    assert r"D\textbar{}KD & \textbf{73.00 $\pm$ 2.00} (3) [71.97] & -- \\" in written
    assert r"A\_1 & KD & 71.00 $\pm$ 1.00 & 3 & 70.66 & +0.34 &  & 1:05 \\" in written
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert written.count(rule) == 2


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(results: Results, tmp_path: Path) -> None:
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n%s\\end{document}"
    (tmp_path / "t.tex").write_text(document % latex(results))
    subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)


def test_csv_has_a_line_per_cell(results: Results) -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert len(lines) == 6
    kd, dkd = lines[1], lines[2]
    assert (kd["mean"], kd["std"], kd["n"], kd["seeds"]) == ("71.0", "1.0", "3", "0 1 2")
    assert (dkd["published"], dkd["baseline"], dkd["pairs"]) == ("71.97", "KD", "3")
    assert float(dkd["difference"]) == pytest.approx(1.03)
    assert float(dkd["p_value"]) == pytest.approx(0.0741799, abs=1e-6)
    assert (lines[3]["missing"], lines[3]["mean"]) == ("missing", "")
    assert {line["profile"] for line in lines} == {"smoke"}


def test_json_is_the_csv_and_the_runs(results: Results) -> None:
    document = json.loads(as_json(results))
    assert document["rows"] == ["Teacher", "KD", "D|KD"]
    lines = csv.DictReader(io.StringIO(as_csv(results)))
    for cell, line in zip(document["cells"], lines, strict=True):
        assert cell.keys() - line.keys() == {"runs", "failures"}
        for key in ("mean", "p_value", "difference"):
            assert line[key] == ("" if cell[key] is None else str(cell[key]))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_labels_a_profile(results: Results, name: str) -> None:
    assert "smoke" in FORMATS[name](results)
    assert "smoke" not in FORMATS[name](replace(results, profile=""))


AWKWARD = [
    "[x] 50%_a",
    "* #1 & {b}",
    "=SUM(A1)",
    "_init_ <b>",
    'say "no"',
    "a\nb",
    "~^\\|$",
    "[a](b)",
]
"""Labels with all that some format takes for its own."""


@pytest.fixture
def awkward() -> Results:
    blank = Entry("", "c", "distilled", "accuracy", "max", {0: 90.0}, 1)
    return Results(
        title="=t\n% of",
        description="",
        rows=AWKWARD,
        columns=["c"],
        entries=[replace(blank, row=row) for row in AWKWARD],
        epoch="last",
    )


def test_labels_of_any_letters_leave_tables_whole(awkward: Results) -> None:
    lines = markdown(awkward).splitlines()
    bars = [line.count("|") - line.count("\\|") for line in lines if line.startswith("|")]
    assert bars == [3] * 10 + [9] * 10
    assert "| \\_init\\_ \\<b> | **90.00** (1) |" in lines
    assert "| [a\\](b) | **90.00** (1) |" in lines
    rows = [line for line in latex(awkward).splitlines() if not line.startswith("%")]
    ends = [line for line in rows if line.endswith(r"\\")]
    assert len(ends) == 2 * (len(AWKWARD) + 1)
    assert not [line for line in ends if line.startswith(("[", "*"))]
    assert r"{[}x] 50\%\_a & \textbf{90.00} (1) \\" in rows
    assert "% =t % of" in latex(awkward).splitlines()


def test_no_cell_of_a_spreadsheet_is_a_formula(awkward: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(awkward))))
    assert [row["row"] for row in rows] == [
        f"'{label}" if label.startswith("=") else label for label in AWKWARD
    ]
    negative = [replace(awkward.entries[0], values={0: -1.5})]
    written = as_csv(replace(awkward, entries=negative, rows=AWKWARD[:1]))
    (row,) = csv.DictReader(io.StringIO(written))
    assert float(row["mean"]) == -1.5


def test_cells_that_read_the_same_are_equally_good(results: Results) -> None:
    close = [replace(results.cells["KD", "A_1"], values={0: v, 1: v}) for v in (73.001, 72.999)]
    worse = replace(close[0], values={0: 72.99, 1: 72.99}, row="E")
    shown = [close[0], replace(close[1], row="D|KD"), worse]
    tied = replace(results, rows=["KD", "D|KD", "E"], columns=["A_1"], entries=shown)
    assert markdown(tied).count("**73.00 ± 0.00**") == 2
    assert "**72.99" not in markdown(tied)
