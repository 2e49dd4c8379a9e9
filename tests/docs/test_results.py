"""docs/results.md against the files and keys of a real run."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT
from tests.docs.test_documents import environment

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
TINY = "method=sinkhorn teacher=resnet8 student=small_cnn training=smoke teacher.allow_chance=true"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    command = ["bash", "-c", f"kdrun {TINY}"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "outputs"


@pytest.fixture(scope="module")
def directory(outputs: Path) -> Path:
    (result,) = outputs.glob("digits/*/*/seed0/result.json")
    return result.parent


def documented(section: str) -> list[str]:
    """The first column of the table in a section."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def is_meant(name: str, pattern: str) -> bool:
    return re.fullmatch(re.sub(r"<\w+>", r"\\w+", pattern.replace(".", r"\.")), name) is not None


def test_every_key_is_documented_and_every_documented_key_exists(directory: Path) -> None:
    result = json.loads((directory / "result.json").read_text())
    keys, patterns = set(leaves(result)), documented("result.json")
    assert [key for key in keys if sum(is_meant(key, p) for p in patterns) != 1] == []
    assert [p for p in patterns if not any(is_meant(key, p) for key in keys)] == []


def test_every_file_is_documented_and_every_documented_file_exists(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == set(documented("Files of a run"))


def test_files_of_the_store_are_documented(outputs: Path) -> None:
    text = PAGE.partition("A directory in the store")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([^`]+)`", text))
    networks = [path for path in (outputs / "store" / "network").iterdir() if path.is_dir()]
    assert len(networks) == 2
    for network in networks:
        assert {path.name for path in network.iterdir()} == named


def test_every_column_is_documented(directory: Path) -> None:
    with (directory / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    patterns = documented("metrics.csv")
    assert patterns[-1] == "<diagnostic>"
    named = patterns[:-1]
    others = [name for name in columns if not any(is_meant(name, p) for p in named)]
    assert [p for p in named if not any(is_meant(name, p) for name in columns)] == []
    assert others and all(name.startswith("sinkhorn_") for name in others)
