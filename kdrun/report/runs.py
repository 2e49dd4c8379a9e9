"""Finished runs, read from their directories and nothing else."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.artefacts import RESULT, RESULT_SCHEMA
from kdrun.errors import UserError
from kdrun.files import parse_json, walk
from kdrun.identity import NOT_COMPUTING, NOT_IDENTITY

NOT_RUNS = ("store", "tables", "sweeps")
"""Folders below an output directory that hold no runs."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run: the content of its ``result.json``.

    Attributes:
        directory: where it lies; its parent names the configuration.
        names: the choice in each config group.
        seed: of the student.
        data_seed: of the order of its data; None: the seed.
        protocol: ``holdout`` or ``paper``.
        metric: the task's objective; ``direction``: ``max`` or ``min`` of it is better.
        command: what repeats the run.
        seconds: wall time of the run.
        artefacts: name of the artefact of each stage.
        networks: facts of each network by role (``teacher``, ``alone``, ``distilled``).
    """

    directory: Path
    names: Mapping[str, str]
    seed: int
    protocol: str
    metric: str
    direction: str
    command: str
    seconds: float
    artefacts: Mapping[str, str]
    networks: Mapping[str, Mapping[str, Any]]
    data_seed: int | None = None

    def value(self, network: str, metric: str, epoch: str) -> float | None:
        """A test result; None where the run has no such network.

        Args:
            network: its role.
            metric: for example ``accuracy``.
            epoch: ``last`` or ``best``; a teacher has but one.

        Raises:
            UserError: the run has no such metric.
        """
        values = self.results(network, epoch)
        if values is None:
            return None
        if metric not in values:
            known = ", ".join(values)
            raise UserError(f"{self.directory}: no metric {metric} (metrics: {known})")
        return values[metric]

    def results(self, network: str, epoch: str) -> Mapping[str, float] | None:
        """All test results of a network; None where the run has no such network."""
        entry = self.networks.get(network)
        if entry is None:
            return None
        return entry["test"] if "test" in entry else entry[f"test_{epoch}"]

    def training_seconds(self, network: str) -> float | None:
        """How long a network was trained; None where it was not trained by kdrun."""
        entry = self.networks.get(network, {})
        return entry.get("training", {}).get("seconds")

    def trained_along(self, network: str) -> bool:
        """Whether the run has trained a network other than its student, beside it."""
        return (self.directory / f"{network}.safetensors").is_file()

    def words(self) -> list[str]:
        """The overrides of its command, without flags."""
        return [word for word in shlex.split(self.command)[1:] if "=" in word]


FORM = {"names": dict, "seed": int, "command": str, "artefacts": dict, "networks": dict}
"""Of what type entries of a result are that are not just shown."""


def read_run(directory: Path) -> Run:
    """The run in a directory.

    Raises:
        UserError: it is not finished, or its result is damaged or of another version of kdrun.
    """
    path = directory / RESULT
    try:
        result = parse_json(path.read_bytes())
        if result["schema"] != RESULT_SCHEMA:
            raise UserError(
                f"{path} has the form {result['schema']} of another version of kdrun; this one "
                f"reads {RESULT_SCHEMA}"
            )
        for entry, kind in FORM.items():
            if not isinstance(result[entry], kind):
                raise ValueError(f"{entry} is no {kind.__name__}")
        return Run(
            directory=directory,
            names=result["names"],
            seed=result["seed"],
            protocol=result["protocol"],
            metric=result["metric"],
            direction=result["direction"],
            command=result["command"],
            seconds=result["seconds"],
            artefacts=result["artefacts"],
            networks=result["networks"],
            data_seed=result.get("data_seed"),
        )
    except FileNotFoundError:
        raise UserError(f"{directory} is no finished run: it has no {RESULT}") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is damaged: {reason}") from error


def find_runs(places: Iterable[Path]) -> list[Path]:
    """The directories of all finished runs in or below some directories, sorted.

    Raises:
        UserError: a place does not exist, or holds no finished run.
    """
    found: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such directory")
        below = list(_below(place))
        if not below:
            raise UserError(f"{place}: no finished run in or below it")
        found |= dict.fromkeys(sorted(below))
    return list(found)


def _below(place: Path) -> Iterator[Path]:
    for folder, folders, files in walk(place):
        if RESULT in files:
            folders.clear()
            yield folder
        else:
            folders[:] = [n for n in folders if n not in NOT_RUNS and not n.startswith(".")]


def read_runs(directories: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs in some directories, and what is wrong with those that cannot be read."""
    runs, problems = [], []
    for directory in directories:
        try:
            runs.append(read_run(directory))
        except UserError as error:
            problems.append(str(error))
    return runs, problems


def by_configuration(runs: Iterable[Run]) -> dict[Path, list[Run]]:
    """Runs that differ by their seed only, together, in the order of their seeds.

    Output directories may share a configuration; a seed that several of them have counts once, as
    the first of them has it.
    """
    groups: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in runs:
        # <dataset>/<pair>/<method>-<hash>, whatever the output directory.
        configuration = run.directory.resolve().parts[-4:-1]
        groups.setdefault(configuration, {}).setdefault(run.seed, run)
    found = [sorted(group.values(), key=lambda run: run.seed) for group in groups.values()]
    return {group[0].directory.parent: group for group in found}


def labels(groups: Sequence[Sequence[Run]]) -> list[tuple[str, str]]:
    """A row and a column for each configuration of a set of runs.

    The column is the data set and the pair of networks, the row the method. Where that leaves two
    configurations in one place, rows also tell the overrides in which the configurations of that
    method differ, and at last the fingerprint.
    """
    firsts = [group[0] for group in groups]
    columns = [f"{r.names['dataset']} {r.names['teacher']}-{r.names['student']}" for r in firsts]
    methods = [run.names["method"] for run in firsts]
    words = [set(_telling(run)) for run in firsts]
    rows = list(methods)
    of_method: dict[str, list[int]] = {}
    for i, method in enumerate(methods):
        of_method.setdefault(method, []).append(i)
    for method, members in of_method.items():
        if len({columns[i] for i in members}) == len(members):
            continue
        common = set.intersection(*(words[i] for i in members))
        for i in members:
            rows[i] = " ".join([method, *sorted(words[i] - common)])
    places = list(zip(rows, columns, strict=True))
    configurations = Counter(places)
    for i, place in enumerate(places):
        if configurations[place] > 1:
            rows[i] = f"{rows[i]} ({firsts[i].directory.parent.name.rpartition('-')[2]})"
    return list(zip(rows, columns, strict=True))


def natural(text: str) -> list[tuple[float, str]]:
    """A key that sorts 8 before 16, inside of words too."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part), "") if i % 2 else (0.0, part) for i, part in enumerate(parts)]


NOT_TOLD = (
    *("method", "dataset", "teacher", "student"),
    *NOT_IDENTITY,
    *(f"trainer.{option}" for option in NOT_COMPUTING),
)
"""Overrides that a row's label never tells: they stand elsewhere, or change no result."""


SPELLINGS = {"True": "true", "False": "false", "None": "null"}
"""Sweeps write Python's words where people write YAML's."""


def _telling(run: Run) -> list[str]:
    parts = (word.partition("=") for word in run.words())
    return [
        f"{key}={SPELLINGS.get(value, value)}"
        for key, _, value in parts
        if key.lstrip("+").removeprefix("model@") not in NOT_TOLD
    ]
