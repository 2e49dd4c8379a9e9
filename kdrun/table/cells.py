"""What a table comes to: its runs, where each lies, and in which order they are best done."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdrun import __version__
from kdrun.catalogue import Catalogue
from kdrun.config import Config, compose
from kdrun.errors import ConfigErrors, UserError
from kdrun.files import write_atomically
from kdrun.identity import fingerprint, run_directory
from kdrun.members import AT_ONCE, LARGEST_GROUP, group_of
from kdrun.overrides import merge
from kdrun.redaction import redact
from kdrun.table.config import Column, Row, Table

MOST_PROBLEMS = 20
"""So many lines about a table's configurations are shown."""


@dataclass(frozen=True)
class Arm:
    """One configuration of a table: a row in a column; its runs differ by seed only.

    Attributes:
        row: label of its row; ``column``: of its column.
        words: the overrides, without the seed.
        directory: what holds the directories of its runs, ``seed<k>`` each.
        teacher: names what the teacher depends on; ``student``: what the student alone does.
        epochs: of each training, by the name of its stage.
        group: equal for configurations whose runs may go side by side; empty: by itself.
        at_once: so many at most.
    """

    row: str
    column: str
    words: tuple[str, ...]
    directory: Path
    teacher: str
    student: str
    epochs: Mapping[str, int] = field(hash=False)
    group: str = ""
    at_once: int = 1


@dataclass(frozen=True)
class Cell:
    """One run of a table."""

    arm: Arm
    seed: int

    @property
    def words(self) -> list[str]:
        """The overrides of the run: ``kdrun <words>`` does it alone."""
        return [*self.arm.words, f"seed={self.seed}"]

    @property
    def directory(self) -> Path:
        """The directory of the run."""
        return self.arm.directory / f"seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.arm.row} / {self.arm.column} / seed {self.seed}"


def layers(table: Table, row: Row, column: Column, profile: str | None) -> list[Sequence[str]]:
    """The overrides of a row in a column, from the most general to the most particular."""
    shrunk = table.profiles[profile].words if profile else ()
    return [table.words, column.words, row.words or (), row.extra.get(column.label, ()), shrunk]


def plan(
    table: Table,
    catalogue: Catalogue,
    *,
    profile: str | None = None,
    typed: Sequence[str] = (),
) -> list[Arm]:
    """Every configuration of a table, composed and checked.

    Args:
        table: the table.
        catalogue: the config files.
        profile: name of the profile that shrinks every run.
        typed: overrides of every run that were typed; they win over all others.

    Raises:
        ConfigErrors: configurations are wrong; every different mistake once, and where it was
            found first.
    """
    arms, problems = [], {}
    for row in table.rows:
        for column in table.columns:
            if row.words is None or column.label in row.skip:
                continue
            words = merge([*layers(table, row, column, profile), typed])
            try:
                config = compose(words, catalogue)
            except ConfigErrors as error:
                for problem in error.problems:
                    problems.setdefault(
                        problem, f"table {table.name}, {row.label} / {column.label}"
                    )
                continue
            arms.append(arm_of(row.label, column.label, words, config))
    if problems:
        lines = [f"{place}: {problem}" for problem, place in problems.items()]
        raise ConfigErrors(lines[:MOST_PROBLEMS])
    return arms


def cells_of(arms: Iterable[Arm], seeds: Sequence[int]) -> list[Cell]:
    """The runs of a table, each once, in the order in which they are best done.

    First come, for each teacher, one run that needs it: so that several processes train different
    teachers and nobody waits long for one. Next those that bring a student alone that others share,
    then all others, seed by seed.
    """
    distinct: dict[Path, Cell] = {}
    for seed in seeds:
        for arm in arms:
            cell = Cell(arm, seed)
            distinct.setdefault(cell.directory, cell)
    seen: set[Any] = set()
    ranks: dict[Cell, int] = {}
    for cell in distinct.values():
        teacher, student = cell.arm.teacher, (cell.arm.student, cell.seed)
        ranks[cell] = 0 if teacher not in seen else 1 if student not in seen else 2
        seen |= {teacher, student}
    return sorted(distinct.values(), key=ranks.__getitem__)


def arm_of(row: str, column: str, words: Sequence[str], config: Config) -> Arm:
    """The configuration of a row in a column."""
    values = config.values
    settings = dict(values["training"])
    teacher_settings = settings.pop("teacher") or {}
    changed = {key: value for key, value in teacher_settings.items() if value is not None}
    everywhere = {key: values[key] for key in ("dataset", "task", "protocol")}
    for_teacher = settings | changed
    return Arm(
        row=row,
        column=column,
        words=tuple(words),
        directory=run_directory(values, config.names).parent,
        teacher=fingerprint(everywhere | {"network": values["teacher"], "training": for_teacher}),
        student=fingerprint(everywhere | {"network": values["student"], "training": settings}),
        epochs=_epochs(values, for_teacher["epochs"]),
        group=group_of(values),
        at_once=values[AT_ONCE] or LARGEST_GROUP,
    )


def _epochs(values: Mapping[str, Any], of_teacher: int) -> dict[str, int]:
    """Epochs of each training of a run, by the name of its stage; of all rounds where it is
    repeated in rounds."""
    teacher, method, epochs = values["teacher"], values["method"], values["training"]["epochs"]
    stages = values["recipe"]["stages"]
    given = teacher["checkpoint"] or teacher.get("pretrained")
    trained = {"teacher": of_teacher} if teacher["finetune"] or not given else {}
    once = trained | {"alone": epochs, "distil": epochs}
    found = {stage: number for stage, number in once.items() if stages.get(stage)}
    nodes = filter(None, stages.values())  # null: taken out
    repeated = {stage for node in nodes for stage in node.get("stages") or ()}
    for stage in repeated & {"alone", "distil"}:
        found[stage] = method.get("rounds", 0) * epochs + (method.get("final_epochs") or epochs)
    return found


# -- plans that are kept ---------------------------------------------------------------------------


def stored_plan(
    table: Table,
    catalogue: Catalogue,
    folder: Path,
    *,
    profile: str | None = None,
    typed: Sequence[str] = (),
) -> list[Arm]:
    """``plan``, kept in ``folder`` for as long as neither config files nor kdrun change.

    Composing the hundred and more configurations of a large table takes many seconds; showing how
    far it is must not.
    """
    asked = fingerprint({"profile": profile, "typed": list(typed)}, 8)
    path = folder / f"{table.name}-{asked}.json"
    state = fingerprint(
        {"version": __version__, "table": asdict(table), "files": _state(catalogue)}
    )
    stored = _stored(path)
    if stored.get("state") == state:
        return [_restored(fields) for fields in stored["arms"]]
    if sys.stderr.isatty():
        print(f"{table.name}: composing its configurations", file=sys.stderr)
    arms = plan(table, catalogue, profile=profile, typed=typed)
    text = json.dumps({"state": state, "arms": [asdict(arm) for arm in arms]}, default=str)
    if redact(text) == text:  # A plan without its secrets is none, and with them is not kept.
        with contextlib.suppress(UserError):  # Where only reading is allowed it is made anew.
            write_atomically(path, text)
    return arms


def _stored(path: Path) -> dict[str, Any]:
    """What a plan's file holds; nothing where there is none, or a torn one, which is made anew."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _restored(stored: Mapping[str, Any]) -> Arm:
    fields = stored | {"words": tuple(stored["words"]), "directory": Path(stored["directory"])}
    return Arm(**fields)


def _state(catalogue: Catalogue) -> list[tuple[str, int, int]]:
    """What changes when a config file does, or the code that names runs."""
    files = [path for root in catalogue.directories for path in root.rglob("*.yaml")]
    files += Path(__file__).parents[1].rglob("*.py")
    facts = [(path, path.stat()) for path in sorted(files)]
    return [(str(path), fact.st_mtime_ns, fact.st_size) for path, fact in facts]
