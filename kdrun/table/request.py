"""What was typed after ``kdrun table`` or ``kdrun report``: which table, and which part of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdrun.catalogue import SWEEP_GROUPS, Catalogue, listing, nearest
from kdrun.errors import UserError
from kdrun.parameters import PositiveInt, complaint
from kdrun.table.cells import Arm, stored_plan
from kdrun.table.config import Table, open_table


@dataclass
class Request:
    """What is asked for.

    Attributes:
        name: of the table.
        profile: name of the profile that shrinks every run; None: as the table says.
        seeds: in place of the table's; None: those.
        rows: labels of the rows that are wanted, as typed; None: all. ``columns`` likewise.
        fail_fast: stop at the first failure.
        dry_run: only list the runs.
        workers: processes that a launcher starts.
        launcher: its settings as typed, empty without one.
        overrides: of every run, as typed.
    """

    name: str
    profile: str | None = None
    seeds: tuple[int, ...] | None = None
    rows: str | None = None
    columns: str | None = None
    fail_fast: bool = False
    dry_run: bool = False
    workers: int = 2
    launcher: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        """Where runs are kept."""
        given = [word for word in self.overrides if word.startswith("output_dir=")]
        return Path(given[-1].partition("=")[2].strip("'\"") if given else "outputs")

    @property
    def folder(self) -> Path:
        """Where the finished table is written: ``outputs/tables/<name>[-<profile>]``."""
        name = self.name.replace("/", "_") + (f"-{self.profile}" if self.profile else "")
        return self.output_dir / "tables" / name


def read_request(words: Sequence[str]) -> Request:
    """Take the words of a command apart.

    Raises:
        UserError: a word is not one that tables know.
    """
    name, *rest = words
    request = Request(name)
    for word in rest:
        key, equals, value = word.partition("=")
        if word == "--dry-run":
            request.dry_run = True
        elif word.startswith("-"):
            raise UserError(f"{word}: no such flag (flags of a table: --dry-run)")
        elif not equals:
            raise UserError(f"{word}: '=' is missing; options are written key=value")
        elif key == "profile":
            request.profile = value
        elif key == "seeds":
            request.seeds = _seeds(value)
        elif key == "rows":
            request.rows = value
        elif key == "columns":
            request.columns = value
        elif key == "fail_fast":
            request.fail_fast = _flag(word, value)
        elif key == "workers":
            request.workers = _positive(word, value)
        elif key.split(".")[0] in SWEEP_GROUPS:
            request.launcher.append(word)
        elif key == "seed":
            raise UserError(f"{word}: a table has several; write seeds=3 or seeds=[{value}]")
        elif key == "data_seed":
            raise UserError(f"{word}: is said by the entry data_order of the table's file")
        else:
            request.overrides.append(word)
    return request


def chosen_table(request: Request, catalogue: Catalogue) -> Table:
    """The table that is asked for, with the seeds that are.

    Raises:
        UserError: there is no such table, profile, row or column.
    """
    table = open_table(request.name, catalogue)
    if request.profile is not None:
        _known([request.profile], list(table.profiles), "profile", table)
    wanted_rows(request, table)
    wanted_columns(request, table)
    of_profile = table.profiles[request.profile].seeds if request.profile else None
    return replace(table, seeds=request.seeds or of_profile or table.seeds)


def chosen_arms(request: Request, table: Table, catalogue: Catalogue) -> list[Arm]:
    """The configurations behind the rows and columns that are asked for."""
    arms = stored_plan(
        table,
        catalogue,
        request.output_dir / "tables" / ".plans",
        profile=request.profile,
        typed=request.overrides,
    )
    rows = {table.runs_of(table.row(label)).label for label in wanted_rows(request, table)}
    columns = wanted_columns(request, table)
    return [arm for arm in arms if arm.row in rows and arm.column in columns]


def wanted_rows(request: Request, table: Table) -> list[str]:
    """The labels of the rows that are asked for, in the table's order.

    Raises:
        UserError: there is no such row.
    """
    return _wanted(request.rows, [row.label for row in table.rows], "row", table)


def wanted_columns(request: Request, table: Table) -> list[str]:
    """The labels of the columns that are asked for, in the table's order.

    Raises:
        UserError: there is no such column.
    """
    return _wanted(request.columns, [column.label for column in table.columns], "column", table)


def _wanted(text: str | None, known: Sequence[str], kind: str, table: Table) -> list[str]:
    rest = _parts(text or "")
    typed: list[str] = []
    while rest:
        # Labels may have commas in them: the longest that fits is meant.
        ends = range(len(rest), 1, -1)
        end = next((n for n in ends if ", ".join(rest[:n]) in known), 1)
        typed.append(", ".join(rest[:end]))
        rest = rest[end:]
    _known(typed, known, kind, table)
    return [label for label in known if label in typed] or list(known)


def _known(names: Iterable[str], known: Sequence[str], kind: str, table: Table) -> None:
    for name in names:
        if name not in known:
            meant = nearest(name, known)
            hint = f" Did you mean {meant}?" if meant else ""
            shown = listing(known) if known else "none"
            raise UserError(
                f"{kind}={name}: no such {kind} of {table.name}.{hint} ({kind}s: {shown})"
            )


def _seeds(text: str) -> tuple[int, ...]:
    """``3`` is 0, 1, 2; ``[3]`` and ``3,5`` are what they say."""
    parts = _parts(text)
    if not parts or not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"seeds={text}: must be a number of seeds or a list such as [0,1,2]")
    numbers = tuple(int(part) for part in parts)
    single = len(numbers) == 1 and not text.startswith("[")
    if single:
        return tuple(range(_positive(f"seeds={text}", text)))
    return numbers


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.strip("[]").split(",") if part.strip()]


def _flag(word: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"{word}: must be true or false")
    return value.lower() == "true"


def _positive(word: str, value: str) -> int:
    number = int(value) if value.isdecimal() else value
    problem = complaint(number, PositiveInt)
    if problem:
        raise UserError(f"{word}: {problem}")
    return int(number)
