"""A table of experiments as its file describes it: rows, columns, seeds, published numbers.

``conf/table/<name>.yaml`` has the entries of ``TableFile`` below; ``docs/tables.md`` explains them.
Overrides are written as on the command line: ``run: method=dkd method.beta=2``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from kdrun.catalogue import Catalogue, description, listing, load_yaml, nearest
from kdrun.checks import unknown_option
from kdrun.errors import ConfigErrors
from kdrun.parameters import NonNegativeInt, PositiveInt, complaint

Network = Literal["teacher", "alone", "distilled"]
Direction = Literal["max", "min"]
Epoch = Literal["last", "best"]
DataOrder = Literal["shared", "independent"]
Number = float | None

ORDERS: dict[DataOrder, tuple[str, ...]] = {"shared": ("data_seed=0",), "independent": ()}
"""Overrides of every run: all seeds see the data in one order, under one augmentation, and go side
by side on one pass of the teacher; or each sees them in an order of its own."""

ENTRIES = {"seed": "seeds", "protocol": "protocol", "data_seed": "data_order"}
"""Options of a run that a table does not take as overrides, and the entries that say them."""


# -- what the file says ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """The entries of a table's file."""

    run: str = ""
    protocol: Literal["holdout", "paper"]
    seeds: PositiveInt | list[NonNegativeInt]
    metric: str
    direction: Direction
    epoch: Epoch = "last"
    data_order: DataOrder = "independent"
    baseline: str
    source: str = ""
    columns: dict
    rows: dict
    profiles: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ColumnFile:
    """A column's entries; a string stands for ``run`` alone."""

    run: str = ""
    metric: str | None = None
    direction: Direction | None = None


@dataclass(frozen=True, kw_only=True)
class RowFile:
    """A row's entries; a string stands for ``run`` alone."""

    run: str | None = None
    network: Network = "distilled"
    published: list[Number] = field(default_factory=list)
    source: str = ""
    cells: dict = field(default_factory=dict)
    skip: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ProfileFile:
    """A profile's entries; a string stands for ``run`` alone."""

    run: str = ""
    seeds: PositiveInt | list[NonNegativeInt] | None = None


# -- what is made of it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One setting in which all rows are compared.

    Attributes:
        label: as in the file.
        words: overrides of its runs.
        metric: test metric that is shown; ``direction``: which of its values are better.
    """

    label: str
    words: tuple[str, ...]
    metric: str
    direction: Direction


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: as in the file.
        words: overrides of its runs; None for a row that is read from the baseline's runs (the
            teacher, the student alone).
        network: whose result is shown.
        published: the published number by column, where there is one.
        source: where its published numbers come from.
        extra: further overrides by column.
        skip: columns in which this row is not run.
    """

    label: str
    words: tuple[str, ...] | None
    network: Network
    published: Mapping[str, float]
    source: str
    extra: Mapping[str, tuple[str, ...]]
    skip: frozenset[str]


@dataclass(frozen=True)
class Profile:
    """What shrinks every run of a table: overrides, and the seeds in place of the table's."""

    words: tuple[str, ...]
    seeds: tuple[int, ...] | None


@dataclass(frozen=True)
class Table:
    """A table of experiments.

    Attributes:
        name: of its file; ``description``: the first comment in it.
        words: overrides of every run, the protocol among them.
        seeds: of the runs of each cell.
        epoch: which weights of a trained student are reported, ``last`` or ``best`` on validation.
        baseline: label of the row that the others are tested against.
        profiles: by name.
    """

    name: str
    description: str
    words: tuple[str, ...]
    protocol: str
    seeds: tuple[int, ...]
    epoch: Epoch
    baseline: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    profiles: Mapping[str, Profile]

    def row(self, label: str) -> Row:
        """The row of a label."""
        return next(row for row in self.rows if row.label == label)

    def runs_of(self, row: Row) -> Row:
        """The row whose runs hold the results of ``row``: itself, or the baseline."""
        return row if row.words is not None else self.row(self.baseline)


def open_table(name: str, catalogue: Catalogue) -> Table:
    """The table of a name.

    Raises:
        UserError: there is no such table.
        ConfigErrors: its file is not what a table's file must be; one line per mistake.
    """
    path = catalogue.path("table", name)
    return read_table(load_yaml(path) or {}, name, description(path), path)


def read_table(tree: Mapping[str, Any], name: str, text: str, path: Path | None = None) -> Table:
    """The table that a file's content describes.

    Args:
        tree: the content.
        name: of the table.
        text: what it is, in one line.
        path: of the file, for messages.

    Raises:
        ConfigErrors: with one line per mistake.
    """
    reader = _Reader(f"table {name}" if path is None else str(path))
    table = reader.table(tree, name, text)
    if reader.problems or table is None:
        raise ConfigErrors(reader.problems)
    return table


class _Reader:
    """Turns the content of a file into a table and collects what is wrong."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.problems: list[str] = []

    def table(self, tree: Mapping[str, Any], name: str, text: str) -> Table | None:
        file = self.entries(tree, TableFile, "")
        if file is None:
            return None
        columns = tuple(self.column(label, node, file) for label, node in file.columns.items())
        labels = [column.label for column in columns]
        rows = tuple(self.row(str(label), node, labels, file) for label, node in file.rows.items())
        self.names(
            [file.baseline], [row.label for row in rows if row.words is not None], "baseline"
        )
        seeds = self.seeds(file.seeds, "seeds")
        if not columns or not rows:
            self.wrong("rows" if columns else "columns", "must not be empty")
        return Table(
            name=name,
            description=text,
            words=(
                f"protocol={file.protocol}",
                *ORDERS[file.data_order],
                *self.words(file.run, "run"),
            ),
            protocol=file.protocol,
            seeds=seeds,
            epoch=file.epoch,
            baseline=file.baseline,
            columns=columns,
            rows=rows,
            profiles={
                str(label): self.profile(node, f"profiles.{label}")
                for label, node in file.profiles.items()
            },
        )

    def profile(self, node: Any, place: str) -> Profile:
        entries = self.entries(_expanded(node), ProfileFile, place) or ProfileFile()
        seeds = None if entries.seeds is None else self.seeds(entries.seeds, f"{place}.seeds")
        return Profile(self.words(entries.run, place), seeds)

    def seeds(self, given: int | list[int], place: str) -> tuple[int, ...]:
        """``3`` is 0, 1, 2; a list is what it says."""
        seeds = tuple(range(given) if isinstance(given, int) else given)
        if len(set(seeds)) != len(seeds) or not seeds:
            self.wrong(place, "must be a number or a list of different seeds")
        return seeds

    def column(self, label: str, node: Any, file: TableFile) -> Column:
        entries = self.entries(_expanded(node), ColumnFile, f"columns.{label}") or ColumnFile()
        return Column(
            str(label),
            self.words(entries.run, f"columns.{label}"),
            entries.metric or file.metric,
            entries.direction or file.direction,
        )

    def row(self, label: str, node: Any, columns: Sequence[str], file: TableFile) -> Row:
        place = f"rows.{label}"
        entries = self.entries(_expanded(node), RowFile, place) or RowFile(network="alone")
        self.names(entries.cells, columns, f"{place}.cells")
        self.names(entries.skip, columns, f"{place}.skip")
        if entries.published and len(entries.published) != len(columns):
            self.wrong(
                f"{place}.published",
                f"has {len(entries.published)} numbers for {len(columns)} columns (null: none)",
            )
        if entries.run is None and entries.network == "distilled":
            self.wrong(place, "needs run: the overrides of its method")
        return Row(
            label=label,
            words=None if entries.run is None else self.words(entries.run, place),
            network=entries.network,
            published={
                column: number
                for column, number in zip(columns, entries.published, strict=False)
                if number is not None
            },
            source=entries.source or file.source,
            extra={
                str(column): self.words(words, f"{place}.cells.{column}")
                for column, words in entries.cells.items()
            },
            skip=frozenset(entries.skip),
        )

    def entries(self, node: Any, kind: type, place: str) -> Any:
        """``node`` as an instance of ``kind``; None where it is not one."""
        if not isinstance(node, Mapping):
            self.wrong(place, "must be a group of options")
            return None
        before = len(self.problems)
        hints = get_type_hints(kind, include_extras=True)
        for key, value in node.items():
            here = f"{place}.{key}" if place else str(key)
            if key not in hints:
                self.problems.append(f"{self.owner}: {unknown_option(here, hints)}")
            elif (problem := complaint(value, hints[key])) is not None:
                self.wrong(here, problem)
        for entry in fields(kind):
            needed = entry.default is MISSING and entry.default_factory is MISSING
            if needed and entry.name not in node:
                self.wrong(f"{place}.{entry.name}" if place else entry.name, "is missing")
        return kind(**node) if len(self.problems) == before else None

    def words(self, text: Any, place: str) -> tuple[str, ...]:
        """Overrides written as on the command line."""
        if not isinstance(text, str):
            self.wrong(place, complaint(text, str) or "")
            return ()
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            self.wrong(place, f"cannot be read: {error}")
            return ()
        for word in words:
            if "=" not in word:
                self.wrong(place, f"{word}: '=' is missing; options are written key=value")
            elif word.split("=")[0] in ENTRIES:
                entry = ENTRIES[word.split("=")[0]]
                self.wrong(place, f"{word}: is said by the table's entry {entry}")
        return words

    def names(self, given: Any, known: Sequence[str], place: str) -> None:
        """Refuse names that are not among the known ones."""
        for name in given:
            if name not in known:
                meant = nearest(str(name), known)
                hint = f" Did you mean {meant}?" if meant else ""
                self.wrong(place, f"{name}: no such name.{hint} (names: {listing(known)})")

    def wrong(self, place: str, problem: str) -> None:
        self.problems.append(f"{self.owner}: {place}: {problem}" if place else problem)


def _expanded(node: Any) -> Any:
    """The long form of what is written as a string."""
    return {"run": node} if isinstance(node, str) else node
