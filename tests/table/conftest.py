from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.catalogue import Catalogue, open_catalogue
from kdrun.table.cells import Arm, Cell

TABLE = """\
# A small table.
protocol: holdout
seeds: 2
metric: accuracy
direction: max
baseline: KD
source: the paper, table 1
run: dataset=digits training=smoke teacher.allow_chance=true
columns:
  cnn-mlp: teacher=small_cnn student=mlp
  cnn-cnn: {run: teacher=small_cnn student=small_cnn, metric: ece, direction: min}
rows:
  Teacher: {network: teacher, published: [90.5, null]}
  Alone: {network: alone}
  KD: method=kd
  DKD:
    run: method=dkd method.alpha=2
    published: [91, 4.5]
    cells: {cnn-mlp: method.beta=2}
  Sinkhorn: {run: method=sinkhorn, skip: [cnn-cnn], source: ours}
profiles:
  tiny: student=mlp
"""


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """A config folder with the table ``small``."""
    (tmp_path / "configs" / "table").mkdir(parents=True)
    (tmp_path / "configs" / "table" / "small.yaml").write_text(TABLE)
    return tmp_path / "configs"


@pytest.fixture
def catalogue(config_dir: Path) -> Catalogue:
    return open_catalogue([config_dir])


def arm(root: Path, row: str = "KD", column: str = "a-b") -> Arm:
    """A configuration of a table that lies in ``root``."""
    return Arm(
        row=row,
        column=column,
        words=(f"method={row}",),
        directory=root / column / row,
        teacher=f"teacher of {column}",
        student=f"student of {column}",
        epochs={"teacher": 3, "alone": 2, "distil": 2},
    )


def finish(cell: Cell, seconds: float = 1.0) -> None:
    """Leave the files of a finished run."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    (cell.directory / "result.json").write_text(json.dumps({"seconds": seconds}))
    (cell.directory / "artefact.json").write_text("{}")


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    """Two rows, one column, two seeds."""
    return [Cell(arm(tmp_path, row), seed) for row in ("KD", "DKD") for seed in (0, 1)]


class Recorder:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def started(self, cell: Cell) -> None:
        self.events.append(("started", str(cell)))

    def said(self, cell: Cell, line: str) -> None:
        self.events.append(("said", line))

    def finished(self, cell: Cell, seconds: float, error: str) -> None:
        self.events.append(("finished", error))

    def waiting(self, left: int) -> None:
        self.events.append(("waiting", str(left)))

    def close(self) -> None:
        self.events.append(("closed", ""))


@pytest.fixture
def view() -> Recorder:
    return Recorder()


@pytest.fixture
def runs(cells: list[Cell]) -> Callable[[list[str]], None]:
    """A run that finishes at once and prints a line."""
    by_words = {tuple(cell.words): cell for cell in cells}

    def run(words: list[str]) -> None:
        print("epoch 1/1")
        finish(by_words[tuple(words)])

    return run
