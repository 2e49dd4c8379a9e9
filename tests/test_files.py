from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

from kdrun.cli import run as kdrun
from kdrun.errors import UserError
from kdrun.files import json_text, parse_json, read_json, write_json
from kdrun.job import Record, read_records

ROOT = Path(__file__).parents[1]
HASHES, PLANS = ("identity.py", "redaction.py", "data/pixel_cache.py"), "table/cells.py"
HEADERS = ("checkpoints.py", "data/module.py", "given_weights.py", "stages/search.py")
MAY_WRITE_JSON = ("files.py", *HASHES, *HEADERS, PLANS)
"""What is written elsewhere holds no number that could be infinite: hashes, words, sizes."""


def strict(text: str) -> Any:
    """What a reader makes of a document that knows no NaN, as most readers in other languages."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


DOCUMENT = {
    "loss": math.nan,
    "networks": {"distilled": {"kl": math.inf, "accuracy": 90.0, "top": None}},
    "history": [1.0, -math.inf, {"x": math.nan}],
}


def test_a_number_that_is_not_finite_is_null_and_named() -> None:
    told = strict(json_text(DOCUMENT))
    assert told["loss"] is None
    assert told["networks"]["distilled"] == {"kl": None, "accuracy": 90.0, "top": None}
    assert told["history"] == [1.0, None, {"x": None}]
    assert told["not_finite"] == {
        "loss": "nan",
        "networks.distilled.kl": "inf",
        "history.1": "-inf",
        "history.2.x": "nan",
    }


def test_reading_gives_the_numbers_back() -> None:
    read = parse_json(json_text(DOCUMENT))
    assert math.isnan(read["loss"]) and math.isnan(read["history"][2]["x"])
    assert read["history"][1] == -math.inf
    assert read["networks"] == DOCUMENT["networks"]
    assert list(read) == list(DOCUMENT)


def test_finite_documents_are_as_they_are() -> None:
    document = {"a": [1, 2.5, "x", None, True], "b": {"c": Path("d")}}
    assert strict(json_text(document)) == {"a": [1, 2.5, "x", None, True], "b": {"c": "d"}}


def test_files_are_strict_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a" / "result.json"
    write_json(path, DOCUMENT)
    strict(path.read_text())
    assert math.isnan(read_json(path)["loss"])
    path.write_bytes(b'{"loss": \xff}')
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        read_json(path)


def test_records_of_a_sweep_are_strict(tmp_path: Path) -> None:
    Record(3, ["seed=1"], objective=math.nan).write(tmp_path)
    strict((tmp_path / "3.json").read_text())
    (record,) = read_records(tmp_path)
    assert math.isnan(record.objective)


def test_json_is_written_by_one_function() -> None:
    package = ROOT / "kdrun"
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix() not in MAY_WRITE_JSON:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
            assert not {"json.dump", "json.dumps"} & set(calls), path


@pytest.mark.slow
def test_a_run_that_diverges_leaves_strict_documents(tmp_path: Path, capsys) -> None:
    """Steps are so large that the weights overflow; every JSON file can be read all the same."""
    words = "method=kd teacher=mlp student=mlp teacher.allow_chance=true trainer.progress=off"
    ruin = "training.optimizer.lr=1e30 training.optimizer.nesterov=false training.nonfinite=skip"
    kdrun([*words.split(), *ruin.split(), "training.epochs=1", f"output_dir={tmp_path}"])
    results = list(tmp_path.rglob("result.json"))
    documents = list(tmp_path.rglob("*.json"))
    assert len(documents) >= 5
    for path in documents:
        strict(path.read_text())
    assert len(results) == 1
    assert read_json(results[0]).get("not_finite") is None
    assert "not_finite" in strict(results[0].read_text())
    assert kdrun(["report", str(tmp_path), "metric=loss", "direction=min"]) == 0
    assert "nan" in capsys.readouterr().out
