"""Runs that may go side by side: their configurations, and what these must have in common."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrun.catalogue import Catalogue
from kdrun.config import Config, compose, spell
from kdrun.errors import ConfigErrors
from kdrun.identity import fingerprint, run_directory
from kdrun.overrides import merge
from kdrun.runs import differences

MEMBERS, AT_ONCE = "members", "members_at_once"
LARGEST_GROUP = 8
"""Runs that are put side by side without being asked; of more, each gains little."""
OWN = (
    *("seed", "data_seed", "student", "method", "training", "allow_packages", "logger"),
    *(MEMBERS, AT_ONCE),
)
"""Config entries in which runs side by side may differ, or of which they share a part only."""


@dataclass(frozen=True)
class MemberRun:
    """An ordinary run that is to go side by side with others.

    Attributes:
        label: what tells it from the others.
        words: the command ``kdrun <words>`` does it alone.
        config: what these words come to.
    """

    label: str
    words: tuple[str, ...]
    config: Config


def member_run(label: str, words: Sequence[str], catalogue: Catalogue) -> MemberRun:
    """The run that some words stand for, composed and checked."""
    return MemberRun(label, tuple(words), compose(words, catalogue))


def member_runs(
    words: Sequence[str], members: Sequence[str], catalogue: Catalogue
) -> list[MemberRun]:
    """The runs that ``members=[...]`` stands for, composed and checked.

    Args:
        words: ``key=value`` words of all of them.
        members: the further words of each, as typed.
        catalogue: the config files.

    Raises:
        ConfigErrors: some are wrong, or cannot go side by side; one line for each mistake.
    """
    common = [word for word in words if not word.startswith(f"{MEMBERS}=")]
    runs, problems = [], dict[str, str]()
    for text in members:
        try:
            merged = merge([common, shlex.split(text)])
            runs.append(member_run(text, merged, catalogue))
        except ValueError as error:
            problems.setdefault(f"cannot be read: {error}", text)
        except ConfigErrors as error:
            for problem in error.problems:
                problems.setdefault(problem, text)
    if problems:
        raise ConfigErrors([f"members, {text}: {problem}" for problem, text in problems.items()])
    found = list(refusals(runs)) if runs else []
    if found:
        raise ConfigErrors(found)
    return runs


def refusals(runs: Sequence[MemberRun]) -> Iterator[str]:
    """Lines for what stands against several runs going side by side."""
    first = runs[0]
    places = {run_directory(run.config.values, run.config.names): run for run in reversed(runs)}
    for run in runs:
        values = run.config.values
        for problem in obstacles(values):
            yield f"members, {run.label}: {problem}"
        same = places[run_directory(values, run.config.names)]
        if same is not run:
            yield f"members, {run.label}: is the same run as {same.label}"
        if order_of(values) != order_of(first.config.values):
            yield (
                f"members, {run.label}: its data come in another order than those of "
                f"{first.label}; give all of them one, such as data_seed=0"
            )
        for key, ours, theirs in differences(common_part(first.config.values), common_part(values)):
            yield (
                f"members, {run.label}: {key} is {spell(theirs)}, that of {first.label} is "
                f"{spell(ours)}; runs side by side share data, teacher, batches and trainer"
            )


def obstacles(config: Mapping[str, Any]) -> Iterator[str]:
    """Options that keep a run from going side by side with any other."""
    trainer = config["trainer"]
    if config[MEMBERS]:
        yield "members: cannot have members of their own"
    if trainer["devices"] * trainer["num_nodes"] > 1:
        yield "trainer.devices: runs go side by side in one process; set it to 1"
    if trainer["compile"]:
        yield "trainer.compile: not possible for runs side by side; set it to false"
    if config["teacher"]["cache"] != "none":
        yield (
            f"teacher.cache={config['teacher']['cache']}: a recorded teacher is not run, so there "
            "is nothing to share; set it to none"
        )
    if config["logger"]["name"] == "wandb":
        yield "logger=wandb: knows one run at a time in a process; choose another"


def order_of(config: Mapping[str, Any]) -> int:
    """The seed of data order and augmentation."""
    return config["seed"] if config["data_seed"] is None else config["data_seed"]


def common_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """What runs side by side must have in common besides the order of their data."""
    part = {name: value for name, value in config.items() if name not in OWN}
    settings = {key: value for key, value in config["training"].items() if key != "teacher"}
    part["training"] = {"batch_size": settings["batch_size"]}
    given = config["teacher"]["checkpoint"] or config["teacher"].get("pretrained")
    if config["teacher"]["finetune"] or not given:
        changed = config["training"]["teacher"].items()
        teacher = settings | {key: value for key, value in changed if value is not None}
        part["training"]["teacher"] = teacher
    return part


def group_of(config: Mapping[str, Any]) -> str:
    """Equal for runs that may go side by side; empty for one that must go alone.

    Only runs whose order of data was set (``data_seed``) are grouped without being asked.
    """
    if config["data_seed"] is None or any(obstacles(config)):
        return ""
    return fingerprint(common_part(config) | {"data_seed": config["data_seed"]})
