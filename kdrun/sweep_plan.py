"""What a sweep is asked to do: words of its runs, of launcher and sweeper, and what is wrong."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrun.catalogue import (
    Catalogue,
    entries,
    load_yaml,
    target_of,
    unknown_choice,
)
from kdrun.checks import unknown_option
from kdrun.config import compose_parsed
from kdrun.errors import ConfigErrors, UserError
from kdrun.members import MEMBERS
from kdrun.overrides import Override, parse
from kdrun.parameters import find_source
from kdrun.search import OBJECTIVES

DIRECTIONS = ("maximize", "minimize")
HYDRA_GROUPS = ("launcher", "sweeper")
"""Groups whose choices are plugins of Hydra."""

CHECKED_COMBINATIONS = 200
"""Up to so many runs are checked one by one before the first starts; of a larger grid, every value
beside the first value of all others, and every combination of groups."""

EXTRAS = {
    "hydra_joblib_launcher": "joblib",
    "hydra_submitit_launcher": "slurm",
    "hydra_ray_launcher": "ray",
    "hydra_optuna_sweeper": "optuna",
}
"""Packages of launchers and sweepers, and the extra of kdrun that installs each."""


@dataclass
class Plan:
    """A sweep as it was typed.

    Attributes:
        overrides: words of the runs.
        hydra_words: settings of launcher and sweeper, for Hydra.
        fail_fast: end with the first failure.
        name: of the sweep's file, where it has one.
        sweeper: what chooses values itself, instead of running all that were typed.
        objectives: what a search looks for.
        pruner: config node of what gives up trials.
    """

    overrides: list[Override]
    hydra_words: list[str]
    fail_fast: bool
    name: str | None = None
    sweeper: str | None = None
    objectives: tuple[str, ...] = ("validation",)
    pruner: dict[str, Any] | None = None

    @property
    def searches(self) -> bool:
        """Whether values are chosen by a search."""
        return self.sweeper is not None

    @property
    def directions(self) -> list[str]:
        """``maximize`` or ``minimize`` for each objective, where that was typed."""
        start = "hydra.sweeper.direction="
        typed = [word for word in self.hydra_words if word.startswith(start)]
        return _listed(typed[-1]) if typed else []

    @property
    def in_this_process(self) -> bool:
        """Whether all runs are known beforehand and done one after the other, in this process."""
        launchers = [word for word in self.hydra_words if word.startswith("hydra/launcher=")]
        return not self.searches and set(launchers) <= {"hydra/launcher=basic"}


def check(words: Sequence[str], catalogue: Catalogue) -> list[str]:
    """What is wrong with the words of a sweep, a line each; nothing is run."""
    return read_plan(words, catalogue)[1]


def read_plan(words: Sequence[str], catalogue: Catalogue) -> tuple[Plan, list[str]]:
    """The sweep that was typed, and what is wrong with it."""
    name, words = expanded(words, catalogue)
    settings, job_words_typed = _split(words)
    fail_fast, settings = _fail_fast(settings)
    objectives, settings, problems = _objectives(settings)
    pruner, settings, pruner_problems = _pruner(settings, catalogue)
    overrides, word_problems = parse(job_words_typed, catalogue)
    hydra_words, setting_problems = hydra_settings(settings, catalogue)
    given = [word.partition("=")[2] for word in settings if word.startswith("sweeper=")]
    sweeper = given[-1] if given and given[-1] != "basic" else None
    plan = Plan(overrides, hydra_words, fail_fast, name, sweeper, objectives, pruner)
    problems += [*pruner_problems, *word_problems, *setting_problems]
    if not plan.searches:
        problems += [
            f"{o.word}: a range without steps needs a search (sweeper=optuna)"
            for o in overrides
            if o.interval
        ]
    problems += [
        f"{o.word}: with -m, runs with a common data_seed go side by side by themselves"
        for o in overrides
        if o.key == MEMBERS
    ]
    problems += _search_problems(plan, words)
    problems += _check_values(overrides, catalogue)
    return plan, list(dict.fromkeys(problems))


def expanded(words: Sequence[str], catalogue: Catalogue) -> tuple[str | None, list[str]]:
    """The words of ``sweep=NAME`` in place of that word; what else was typed wins over them.

    Raises:
        UserError: there is no such sweep, or its file is not what it must be.
    """
    names = [word.partition("=")[2] for word in words if word.startswith("sweep=")]
    if not names:
        return None, list(words)
    path = catalogue.path("sweep", names[-1])
    tree = load_yaml(path)
    if not isinstance(tree, dict) or set(tree) != {"run"} or not isinstance(tree["run"], str):
        raise UserError(f"{path}: must have one entry, run: the words of a sweep")
    typed = [word for word in words if not word.startswith("sweep=")]
    keys = {word.partition("=")[0] for word in typed}
    kept = [word for word in shlex.split(tree["run"]) if word.partition("=")[0] not in keys]
    return names[-1], [*kept, *typed]


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words for launcher and sweeper, and words for the runs."""
    ours = (*HYDRA_GROUPS, "hydra", "fail_fast", "objectives", "pruner")
    settings, of_runs = [], []
    for word in words:
        group = word.lstrip("+").partition("=")[0].split(".")[0].split("/")[0]
        if group not in ours:
            of_runs.append(word)
        else:  # Only to Hydra itself does `+` mean something.
            settings.append(word if group == "hydra" else word.lstrip("+"))
    return settings, of_runs


def _fail_fast(settings: list[str]) -> tuple[bool, list[str]]:
    given = [word for word in settings if word.startswith("fail_fast")]
    for word in given:
        if word.lower() not in ("fail_fast=true", "fail_fast=false"):
            raise UserError(f"{word}: fail_fast must be true or false")
    return "fail_fast=true" in map(str.lower, given), [w for w in settings if w not in given]


def _listed(word: str) -> list[str]:
    """The names in ``key=[a,b]`` or ``key=a``."""
    parts = word.partition("=")[2].strip("[]").split(",")
    return [part.strip() for part in parts if part.strip()]


def _objectives(settings: list[str]) -> tuple[tuple[str, ...], list[str], list[str]]:
    """What a search looks for, the settings without that, and what is wrong with it."""
    given = [word for word in settings if word.startswith("objectives=")]
    if not given:
        return ("validation",), settings, []
    names = tuple(_listed(given[-1]))
    unknown = [name for name in names if name not in OBJECTIVES]
    problems = [unknown_choice("objectives", name, list(OBJECTIVES)) for name in unknown]
    if not names or len(set(names)) < len(names):
        problems.append(f"{given[-1]}: must be different ones of {', '.join(OBJECTIVES)}")
    return names, [word for word in settings if word not in given], problems


def _pruner(
    settings: list[str], catalogue: Catalogue
) -> tuple[dict[str, Any] | None, list[str], list[str]]:
    """Config node of the pruner, the settings without it, and what is wrong with it."""
    mine = [word for word in settings if word.startswith(("pruner=", "pruner."))]
    rest = [word for word in settings if word not in mine]
    names = [word.partition("=")[2] for word in mine if word.startswith("pruner=")]
    if not mine or names[-1:] == ["none"]:
        return None, rest, []
    if not names:
        return None, rest, [f"{mine[0]}: say which pruner first (pruner=...)"]
    choices = catalogue.choices("pruner")
    if names[-1] not in choices:
        return None, rest, [unknown_choice("pruner", names[-1], ["none", *choices])]
    node = dict(load_yaml(catalogue.path("pruner", names[-1])))
    problems = []
    for word in mine:
        key, _, value = word.partition("=")
        option = key.removeprefix("pruner.")
        if key == "pruner":
            continue
        if option not in node or option == "_target_":
            known = [name for name in node if name != "_target_"]
            problems.append(unknown_option(key, known, names[-1]))
        elif not value.isdecimal():
            problems.append(f"{word}: must be integer >= 0, got {value}")
        else:
            node[option] = int(value)
    return node, rest, problems


def _search_problems(plan: Plan, words: Sequence[str]) -> list[str]:
    """What only a search can take."""
    if not plan.searches:
        own = ("objectives", "pruner")
        given = [word for word in words if word.partition("=")[0].split(".")[0] in own]
        return [f"{word}: belongs to a search (sweeper=optuna)" for word in given]
    unknown = [name for name in plan.directions if name not in DIRECTIONS]
    if unknown:
        return [unknown_choice("sweeper.direction", name, list(DIRECTIONS)) for name in unknown]
    number = len(plan.directions)
    if number and number != len(plan.objectives):
        return [f"sweeper.direction: {number} directions for {len(plan.objectives)} objectives"]
    if plan.pruner is not None and plan.objectives != ("validation",):
        return ["pruner: gives up trials by their validation result alone; it takes no objectives"]
    return []


def hydra_settings(settings: Sequence[str], catalogue: Catalogue) -> tuple[list[str], list[str]]:
    """Settings of launcher and sweeper as Hydra's overrides, and what is wrong with them."""
    words, problems = [], []
    chosen: dict[str, str] = {}
    for word in settings:
        key, equals, name = word.partition("=")
        if not equals:
            problems.append(f"{word}: '=' is missing; options are written key=value")
        elif key in HYDRA_GROUPS:
            choices = ["basic", *catalogue.choices(key)]
            if name not in choices:
                problems.append(unknown_choice(key, name, choices))
                continue
            chosen[key] = name
            problems += _missing_package(key, name, catalogue)
            words.append(f"hydra/{key}={name if name == 'basic' else f'kdrun/{name}'}")
    for word in settings:
        key, equals, _ = word.partition("=")
        group, _, option = key.partition(".")
        if not equals:
            continue
        if group in HYDRA_GROUPS and option:
            if group not in chosen or chosen[group] == "basic":
                problems.append(f"{word}: say which {group} first ({group}=...)")
                continue
            path = catalogue.path(group, chosen[group])
            known = [entry.key for entry in entries(path) if entry.key != "_target_"]
            node = load_yaml(path)
            inside = any(option.startswith(f"{name}.") and node.get(name) == {} for name in node)
            if option not in known and not inside:
                problems.append(unknown_option(f"{group}.{option}", known, chosen[group]))
                continue
            problems += _setting_problem(word, option, node)
            words.append(f"{'+' if inside else ''}hydra.{word}")
        elif group not in HYDRA_GROUPS:
            words.append(word)
    return words, problems


LEAST = {"n_trials": 1, "sampler.n_startup_trials": 0}
"""Smallest values of settings that count something."""


def _setting_problem(word: str, option: str, node: Mapping[str, Any]) -> list[str]:
    """What is wrong with a setting that its file gives a number."""
    default: Any = node
    for part in option.split("."):
        default = default.get(part) if isinstance(default, dict) else None
    text = word.partition("=")[2]
    if isinstance(default, bool) or not isinstance(default, int | float):
        return []
    if option == "sampler.seed" and text == "null":
        return []
    kind = int if isinstance(default, int) else float
    try:
        value = kind(text)
    except ValueError:
        return [f"{word}: must be {'integer' if kind is int else 'number'}, got {text}"]
    least = 1 if word.startswith("sweeper.n_jobs=") else LEAST.get(option, value)
    if value < least:
        return [f"{word}: must be integer >= {least}, got {text}"]
    if option == "max_failure_rate" and not 0 <= value <= 1:
        return [f"{word}: must be from 0 to 1, got {text}"]
    return []


def _missing_package(group: str, name: str, catalogue: Catalogue) -> list[str]:
    if name == "basic":
        return []
    target = target_of(catalogue.path(group, name)) or ""
    if find_source(target.rpartition(".")[0]) is not None:
        return []
    package = target.split(".")[1]
    extra = EXTRAS.get(package, package)
    return [f"{group}={name}: is not installed; pip install 'kdrun[{extra}]'"]


# -- checks ----------------------------------------------------------------------------------------


def _check_values(overrides: Sequence[Override], catalogue: Catalogue) -> list[str]:
    problems: list[str] = []
    for words in _combinations(overrides):
        single, unread = parse(words, catalogue)
        try:
            compose_parsed(single, catalogue, unread)
        except ConfigErrors as error:
            problems += error.problems
    return list(dict.fromkeys(problems))


def _combinations(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Words of the runs to check; see ``CHECKED_COMBINATIONS``."""
    spelled = [
        [f"{o.key}={value}" for value in o.values] if o.is_sweep else [o.word] for o in overrides
    ]
    if math.prod(map(len, spelled)) <= CHECKED_COMBINATIONS:
        yield from map(list, itertools.product(*spelled))
        return
    groups = [
        words if override.is_choice else words[:1]
        for override, words in zip(overrides, spelled, strict=True)
    ]
    yield from map(list, itertools.islice(itertools.product(*groups), CHECKED_COMBINATIONS))
    for number, words in enumerate(spelled):
        for word in words[1:]:
            yield [word if i == number else first[0] for i, first in enumerate(spelled)]
