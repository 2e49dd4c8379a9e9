"""From what was typed to a checked configuration; all mistakes at once, without importing torch."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.catalogue import (
    Catalogue,
    is_further_network,
    is_group,
    is_network,
    load_yaml,
    typed_group,
    unknown_choice,
)
from kdrun.checks import check, unknown_option
from kdrun.constraints import conflicts
from kdrun.errors import ConfigErrors, UserError
from kdrun.overrides import Override, network_choice, parse, typed_packages
from kdrun.parameters import complaint
from kdrun.targets import KEY, signature_of


@dataclass(frozen=True)
class Config:
    """A configuration that may be run.

    Attributes:
        values: the resolved tree, plain values only.
        names: the choice made in each group, as typed.
        changes: what differs from the defaults, as lines ``key: old -> new``.
    """

    values: dict[str, Any]
    names: dict[str, str]
    changes: list[str]


def compose(words: Sequence[str], catalogue: Catalogue) -> Config:
    """Compose and check the configuration of one run.

    Args:
        words: ``key=value`` words.
        catalogue: the config files there are.

    Raises:
        ConfigErrors: with one line for each thing that is wrong.
    """
    overrides, problems = parse(words, catalogue)
    for override in overrides:
        if override.is_sweep:
            problems.append(several_values(override))
    overrides = [override for override in overrides if not override.is_sweep]
    return compose_parsed(overrides, catalogue, problems)


def compose_parsed(
    overrides: Sequence[Override], catalogue: Catalogue, problems: Sequence[str] = ()
) -> Config:
    """``compose`` for words that were read already; ``problems`` are reported with the rest."""
    problems = list(problems)
    choices, entries, broken = _choose(overrides, catalogue, problems)
    base, names = _base(choices, catalogue.directories)
    names |= {o.key: o.value for o in overrides if o.is_choice and o.key not in broken}
    values = copy.deepcopy(base)
    for role, fixed in entries.items():
        values[role] |= fixed
    if base["allow_packages"] != catalogue.root()["allow_packages"]:
        problems.append("allow_packages: is set by a config file; only the command line may")
    editor = _Editor(values, names)
    for override in overrides:
        if override.is_choice or override.key.split(".")[0] in broken:
            continue
        problems += editor.set(override.key, override.value)
    changes = _changed_choices(overrides, catalogue.defaults(), broken) + editor.changes
    values, unresolved = _resolve(values)
    problems += unresolved
    values = _without_null_stages(values)
    if not unresolved:
        packages = [*catalogue.packages, *typed_packages(overrides)]
        if complaint(values["allow_packages"], list[str]) is None:
            packages = list(dict.fromkeys([*values["allow_packages"], *packages]))
            values["allow_packages"] = packages
        found = check(values, names, packages)
        problems += [line for line in found if line.split(".")[0] not in broken]
    if not problems:
        problems = list(conflicts(values))
    if problems:
        raise ConfigErrors(problems)
    return Config(values, names, changes)


def several_values(override: Override) -> str:
    """The line for a sweep where one run was asked for."""
    text = override.word.partition("=")[2]
    return (
        f"{override.word}: several values need -m (kdrun -m ...); "
        f"a list is written {override.key}=[{text}]"
    )


# -- choices ---------------------------------------------------------------------------------------


def _choose(
    overrides: Sequence[Override], catalogue: Catalogue, problems: list[str]
) -> tuple[tuple[tuple[str, str], ...], dict[str, dict[str, str]], set[str]]:
    """Hydra's group choices, entries to set for networks from outside, and groups gone wrong."""
    choices, entries, broken = [], {}, set()
    for override in overrides:
        if not override.is_choice:
            continue
        available = catalogue.choices(override.key)
        name = override.value
        if is_network(override.key):
            name, entries[override.key] = network_choice(name, available)
        if name not in available:
            problems.append(unknown_choice(override.key, name, available))
            broken.add(override.key)
            entries.pop(override.key, None)
            continue
        choices.append((override.key, name))
    return tuple(choices), entries, broken


def _changed_choices(
    overrides: Sequence[Override], defaults: Mapping[str, str], broken: set[str]
) -> list[str]:
    return [
        f"{o.key}: {defaults.get(o.key)} -> {o.value}"
        for o in overrides
        if o.is_choice and o.key not in broken and defaults.get(o.key) != o.value
    ]


def _refuse_what_is_no_yaml(
    choices: tuple[tuple[str, str], ...], directories: tuple[Path, ...]
) -> None:
    for group, name in choices:
        folder = "model" if is_network(group) else group
        for path in (directory / folder / f"{name}.yaml" for directory in directories):
            try:
                if path.is_file():
                    load_yaml(path)
            except UserError as error:
                raise ConfigErrors([str(error)]) from error


@functools.lru_cache(maxsize=64)
def _base(
    choices: tuple[tuple[str, str], ...], directories: tuple[Path, ...]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree that Hydra composes for these choices, unresolved, and all groups' choices."""
    from omegaconf import OmegaConf, open_dict

    with _hydra(directories[0]) as hydra_compose:
        words = [
            f"{'model@' if is_network(group) else ''}{group}={name}" for group, name in choices
        ]
        if len(directories) > 1:
            others = ",".join(f"'file://{directory}'" for directory in directories[1:])
            words.append(f"hydra.searchpath=[{others}]")
        try:
            tree = hydra_compose("config", words, return_hydra_config=True)
        except Exception as error:
            # Hydra's own errors, and whatever else it comes to with files that are no configs.
            _refuse_what_is_no_yaml(choices, directories)
            message = " ".join(str(error.__cause__ or error).split())
            unknown = [group for group, _ in choices if f"'model@{group}'" in message]
            if unknown:
                raise ConfigErrors([_not_taken(group) for group in unknown]) from error
            raise ConfigErrors([f"the config files do not compose: {message[:300]}"]) from error
    chosen = {
        typed_group(key.split("@_global_.")[-1]): name
        for key, name in tree.hydra.runtime.choices.items()
    }
    names = {group: name for group, name in chosen.items() if is_group(group)}
    with open_dict(tree):
        del tree["hydra"]
    values = OmegaConf.to_container(tree, resolve=False)
    strange = [key for key in values if not isinstance(key, str)]
    if strange:
        raise ConfigErrors([f"the config files set an option named {strange[0]}: names are text"])
    options = load_yaml(directories[0] / "config.yaml")["teacher"]
    further = {key: options | node for key, node in values.items() if is_further_network(key)}
    return values | further, names


def _not_taken(group: str) -> str:
    return f"{group}: neither the method nor the recipe has such a network"


@contextmanager
def _hydra(directory: Path) -> Iterator[Any]:
    """Hydra's ``compose`` over a folder, whatever else in the process uses Hydra (a sweep does).

    Its plugins (launchers, sweepers) are of no use to one run and take a third of its start-up
    time to be looked for, so they stay out of sight.
    """
    hidden = "hydra_plugins" not in sys.modules
    if hidden:
        sys.modules["hydra_plugins"] = None  # type: ignore[assignment]
    try:
        from hydra import compose as hydra_compose
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(directory), job_name="kdrun", version_base="1.3"):
                yield hydra_compose
        finally:
            GlobalHydra.instance().hydra = outer
    finally:
        if hidden:
            del sys.modules["hydra_plugins"]


# -- values ----------------------------------------------------------------------------------------


class _Editor:
    """Sets typed values in a composed tree.

    Attributes:
        values: the tree.
        names: the choice in each group, for messages.
        changes: lines ``key: old -> new`` of what was set.
    """

    def __init__(self, values: dict[str, Any], names: Mapping[str, str]) -> None:
        self.values, self.names = values, names
        self.changes: list[str] = []
        self._free: set[str] = set()

    def set(self, key: str, value: Any) -> list[str]:
        """Set one value; returns the lines that say why it cannot be."""
        *path, last = key.split(".")
        node: Any = self.values
        for depth, part in enumerate(path):
            place = ".".join(path[: depth + 1])
            if not isinstance(node, dict):
                return [_no_options_inside(key, ".".join(path[:depth]), node)]
            if part not in node:
                return [self._unknown(node, place, typed=key)]
            if not node[part] and _takes_mapping(node, part):
                node[part] = {}
                self._free.add(place)
            node = node[part]
        place = ".".join(path)
        if not isinstance(node, dict):
            return [_no_options_inside(key, place, node)]
        if last not in node and place not in self._free and not _may_be_added(node, last):
            return [self._unknown(node, key)]
        old = node.get(last, "unset")
        if isinstance(old, dict) and isinstance(value, dict) and KEY not in value:
            return [
                line for name, item in value.items() for line in self.set(f"{key}.{name}", item)
            ]
        if isinstance(old, dict) and not isinstance(value, dict) and value is not None:
            return [f"{key}: is a group of options, set one of them ({', '.join(old)})"]
        if old != value or type(old) is not type(value):
            self.changes.append(f"{key}: {spell(old)} -> {spell(value)}")
        node[last] = value
        return []

    def _unknown(self, node: Any, place: str, typed: str = "") -> str:
        """The line for a key that is not there; ``typed`` is the longer key it is the start of."""
        typed = typed or place
        if place.split(".")[0] == "model":
            return f"{typed}: say which network is meant: teacher or student instead of model"
        options = dict.fromkeys(key for key in node if key != KEY)
        if isinstance(node.get(KEY), str):
            signature = signature_of(node[KEY])
            options |= dict.fromkeys(signature.parameters if signature else ())
        leaf = typed.rpartition(".")[2]
        elsewhere = [path for path in _paths(self.values) if path.rpartition(".")[2] == leaf]
        section = place.rpartition(".")[0]
        owner = self.names.get(section, section)
        return unknown_option(place, options, owner, elsewhere[0] if elsewhere else None)


def _no_options_inside(key: str, place: str, value: Any) -> str:
    return f"{key}: {place} has no options inside, its value is {spell(value)}"


def _may_be_added(node: Mapping[str, Any], name: str) -> bool:
    """Whether a config entry that is not there is an argument of the class all the same."""
    if not isinstance(node.get(KEY), str):
        return False
    signature = signature_of(node[KEY])
    if signature is None:
        return True  # No source to read: checked when the class is built.
    ours = node[KEY].startswith(("kdrun.", "lightning."))
    return name in signature.parameters or (signature.takes_any_keyword and not ours)


def _takes_mapping(node: Mapping[str, Any], name: str) -> bool:
    """Whether an argument that is null or empty may hold options of its own, whatever they are."""
    if not isinstance(node.get(KEY), str):
        return False
    signature = signature_of(node[KEY])
    known = signature.parameters.get(name) if signature else None
    return (
        known is not None
        and known.annotation is not Any
        and complaint({}, known.annotation) is None
    )


def _paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _resolve(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replace ``${...}`` by what it refers to."""
    if not any("${" in text for text in _texts(values)):
        return values, []
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.create(values)
    try:
        return OmegaConf.to_container(tree, resolve=True), []
    except OmegaConfBaseException as error:
        place = getattr(error, "full_key", None) or "config"
        return values, [f"{place}: {' '.join(str(error).split('full_key')[0].split())}"]


def _without_null_stages(values: dict[str, Any]) -> dict[str, Any]:
    """The tree without the stages that were taken out (``recipe.stages.alone=null``)."""
    recipe = values.get("recipe")
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    if not isinstance(stages, dict):
        return values  # Reported with whatever else is wrong.
    kept = {name: node for name, node in stages.items() if node is not None}
    return {**values, "recipe": {**recipe, "stages": kept}}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def spell(value: Any) -> str:
    """A value as it would be typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(spell, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{spell(item)}" for key, item in value.items()) + "}"
    return str(value)
