from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kdrun.catalogue import Catalogue
from kdrun.errors import ConfigErrors, UserError
from kdrun.table.config import open_table, read_table


def test_a_table_reads_as_its_file_says(catalogue: Catalogue) -> None:
    table = open_table("small", catalogue)
    assert table.description == "A small table."
    assert table.seeds == (0, 1)
    assert table.words[0] == "protocol=holdout"
    assert [column.label for column in table.columns] == ["cnn-mlp", "cnn-cnn"]
    assert [(c.metric, c.direction) for c in table.columns] == [("accuracy", "max"), ("ece", "min")]
    teacher, dkd, sinkhorn = table.row("Teacher"), table.row("DKD"), table.row("Sinkhorn")
    assert teacher.words is None
    assert teacher.published == {"cnn-mlp": 90.5}
    assert teacher.source == "the paper, table 1"
    assert table.runs_of(teacher) is table.row("KD")
    assert dkd.words == ("method=dkd", "method.alpha=2")
    assert dkd.extra == {"cnn-mlp": ("method.beta=2",)}
    assert sinkhorn.skip == {"cnn-cnn"}
    assert sinkhorn.source == "ours"


BROKEN = {
    "unknown entry": ("metrics: accuracy", "metrics: no such option. Did you mean metric?"),
    "unknown row entry": ("rows: {KD: {run: method=kd, publish: [1]}}", "rows.KD.publish: no such"),
    "missing entry": ("baseline: null", "baseline: must be text"),
    "wrong choice": ("direction: up", "direction: must be one of max"),
    "no seeds": ("seeds: 0", "seeds: must be"),
    "double seeds": ("seeds: [1, 1]", "different seeds"),
    "baseline without runs": ("baseline: Teacher", "baseline: Teacher: no such name"),
    "too few numbers": (
        "rows: {KD: {run: method=kd, published: [1, 2]}}",
        "rows.KD.published: has 2 numbers for 1 columns",
    ),
    "unknown column": (
        "rows: {KD: {run: method=kd, cells: {b: method.temperature=2}}}",
        "rows.KD.cells: b: no such name",
    ),
    "no method": ("rows: {KD: method=kd, X: {published: [1]}}", "rows.X: needs run"),
    "word without value": ("run: dataset", "'=' is missing"),
    "seed as a word": ("run: seed=1", "the table's entry seeds"),
    "open quote": ("run: 'a=\"'", "cannot be read"),
    "row is a list": ("rows: {KD: [1]}", "rows.KD: must be a group of options"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_mistakes_are_told_in_one_line(case: str) -> None:
    change, message = BROKEN[case]
    tree = yaml.safe_load(
        "{protocol: paper, seeds: 1, metric: accuracy, direction: max, baseline: KD,"
        " columns: {a: teacher=resnet20}, rows: {KD: method=kd, Teacher: {network: teacher}}}"
    )
    with pytest.raises(ConfigErrors) as caught:
        read_table(tree | yaml.safe_load(change), "t", "")
    assert any(message in problem for problem in caught.value.problems)
    assert all("\n" not in problem for problem in caught.value.problems)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        read_table({"protocol": "papr", "seed": 1, "columns": {}, "rows": {}}, "t", "")
    text = "\n".join(caught.value.problems)
    for entry in ("protocol", "seed", "metric", "direction", "baseline"):
        assert entry in text


def test_an_unknown_table_names_the_nearest(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean table=small"):
        open_table("smal", catalogue)
