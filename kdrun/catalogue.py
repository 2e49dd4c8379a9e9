"""The config files there are: which groups, which choices, and what the files say of themselves.

Reads YAML as text, so that ``ls``, ``show`` and completion need neither Hydra nor torch.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import UserError
from kdrun.files import typed_path
from kdrun.names import listing, nearest
from kdrun.parameters import find_source

if TYPE_CHECKING:
    from yaml import MappingNode

ROLES = ("teacher", "student")
GROUPS = ("method", "recipe", "dataset", "task", "training", *ROLES, "trainer", "logger")
"""Config groups as they are typed; the roles share the folder ``model``."""
FURTHER = "_teacher"
"""What the names of further networks end in."""

SWEEP_GROUPS = {
    "launcher": "sweep/hydra/launcher/kdrun",
    "sweeper": "sweep/hydra/sweeper/kdrun",
    "pruner": "sweep/pruner",
    "sweep": "sweep",
}
"""Groups that only ``-m`` reads, and their folders. Hydra's plugins have configs of the same names,
which a folder of our own keeps apart."""

ENTRY_POINTS = "kdrun.config"


@dataclass(frozen=True)
class Catalogue:
    """The config tree: kdrun's own folder, then the user's and those of installed plugins.

    Attributes:
        directories: roots with one folder per group; names must differ between roots.
        packages: top-level packages of the plugins, from which targets may be built.
    """

    directories: tuple[Path, ...]
    packages: tuple[str, ...] = ()

    def choices(self, group: str) -> list[str]:
        """Names of a group's configs, ``sub/name`` for one in a folder of its own."""
        names = set()
        for directory in self.directories:
            root = directory / folder(group)
            names |= {
                path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")
            }
        return sorted(name for name in names if not _is_of_another_group(group, name))

    def path(self, group: str, name: str) -> Path:
        """The file of a choice.

        Raises:
            UserError: there is no such choice.
        """
        for directory in self.directories:
            file = directory / folder(group) / f"{name}.yaml"
            if file.is_file():
                return file
        raise UserError(unknown_choice(group, name, self.choices(group)))

    def root(self) -> dict[str, Any]:
        """The content of ``config.yaml``, as written."""
        return load_yaml(self.directories[0] / "config.yaml")

    def defaults(self) -> dict[str, str]:
        """The choice of each group in ``config.yaml``, by the name of the group as typed."""
        pairs = [entry for entry in self.root()["defaults"] if isinstance(entry, dict)]
        chosen = {typed_group(key): name for pair in pairs for key, name in pair.items()}
        return {group: name for group, name in chosen.items() if is_group(group)}

    def group_folders(self) -> list[str]:
        """Folders of all groups that have a config, ``table`` and the like included."""
        found = {
            path.name
            for directory in self.directories
            for path in directory.iterdir()
            if path.is_dir() and path.name != "sweep" and any(path.rglob("*.yaml"))
        }
        return sorted(found)


def is_network(key: str) -> bool:
    """Whether a config entry is a network: teacher, student, or a further ``<word>_teacher``.

    A method or recipe that needs further networks brings their entries, each with the options of
    ``teacher``: ``/model@_global_.image_teacher: resnet8`` in its defaults list.
    """
    return key in ROLES or is_further_network(key)


def is_further_network(key: str) -> bool:
    """Whether a config entry is a network besides teacher and student."""
    return key.endswith(FURTHER) and key.isidentifier()


def is_group(key: str) -> bool:
    """Whether a key as typed chooses one of several configs."""
    return key in GROUPS or is_further_network(key)


def folder(group: str) -> str:
    """The folder of a group, relative to the root of the config tree."""
    return "model" if is_network(group) else SWEEP_GROUPS.get(group, group)


def _is_of_another_group(group: str, name: str) -> bool:
    """Whether a file below a group's folder belongs to a group that has a folder in there."""
    place = f"{folder(group)}/{name}"
    return any(
        other.startswith(f"{folder(group)}/") and place.startswith(f"{other}/")
        for other in SWEEP_GROUPS.values()
    )


def typed_group(key: str) -> str:
    """A group as users write it: ``model@student`` is ``student``."""
    return key.removeprefix("model@")


def open_catalogue(extra: Iterable[str | Path] = ()) -> Catalogue:
    """Shipped configs, those of ``extra`` folders (``--config-dir``), and those of plugins.

    Raises:
        UserError: a folder does not exist, or a config has the name of another.
    """
    directories, packages = [shipped()], []
    for given in extra:
        directory = typed_path(given).resolve()
        if not directory.is_dir():
            raise UserError(f"--config-dir {given}: no such folder")
        directories.append(directory)
    for package in plugin_packages():
        source = find_source(package)
        if source is None:
            raise UserError(f"the entry point {ENTRY_POINTS} names {package}, which is not there")
        directories.append(source.parent)
        packages.append(package.split(".")[0])
    catalogue = Catalogue(tuple(dict.fromkeys(directories)), tuple(packages))
    _refuse_doubles(catalogue)
    return catalogue


@functools.cache
def shipped() -> Path:
    """kdrun's own config tree: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


@functools.cache
def plugin_packages() -> tuple[str, ...]:
    """Packages named by the entry points ``kdrun.config`` of whatever is installed.

    The files are read directly: importing ``importlib.metadata`` takes longer than this.
    """
    packages = []
    for place in dict.fromkeys(sys.path):
        for file in sorted(Path(place or ".").glob("*.dist-info/entry_points.txt")):
            text = file.read_text(encoding="utf-8")
            _, found, section = text.partition(f"[{ENTRY_POINTS}]")
            if found:
                lines = section.split("\n[")[0].splitlines()
                packages += [line.partition("=")[2].strip() for line in lines if "=" in line]
    return tuple(dict.fromkeys(packages))


def _refuse_doubles(catalogue: Catalogue) -> None:
    shipped_tree, *others = catalogue.directories
    for directory in others:
        for name in catalogue.group_folders():
            for path in sorted((directory / name).rglob("*.yaml")):
                relative = path.relative_to(directory)
                if (shipped_tree / relative).exists():
                    raise UserError(f"{path}: kdrun itself has {relative}; rename this one")


# -- names ----------------------------------------------------------------------------------------


def unknown_choice(group: str, name: str, choices: list[str]) -> str:
    """The line for a choice that does not exist."""
    meant = nearest(name, choices)
    hint = f" Did you mean {group}={meant}?" if meant else ""
    plural = "models" if is_network(group) else f"{group}s"
    options = listing(choices, more=f"kdrun ls {plural}") if choices else "none"
    return f"{group}={name}: no such {group}.{hint} ({plural}: {options})"


# -- what files say -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of a config file: ``key: value  # comment``."""

    key: str
    value: str
    comment: str


def description(path: Path) -> str:
    """The first comment line of a config."""
    with _told_if_unreadable(path), path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("#") and not line.startswith("# @package"):
                return line.lstrip("# ").strip()
            if line.strip() and not line.startswith("#"):
                break
    return ""


def target_of(path: Path) -> str | None:
    """The ``_target_`` at the top level of a config."""
    return next((entry.value for entry in entries(path) if entry.key == "_target_"), None)


def entries(path: Path) -> Iterator[Entry]:
    """The leaves of a config with their dotted keys, values as written, and comments."""
    import yaml

    with _told_if_unreadable(path):
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    lines = text.splitlines()
    if isinstance(root, yaml.MappingNode):
        yield from _leaves(root, "", text, lines)


def _leaves(node: MappingNode, prefix: str, text: str, lines: list[str]) -> Iterator[Entry]:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if key_node.value == "defaults" and not prefix:
            continue
        block = value_node.tag.endswith(":map") and not value_node.flow_style
        if block and value_node.value:
            yield from _leaves(value_node, f"{key}.", text, lines)
            continue
        end = value_node.end_mark
        value = " ".join(text[value_node.start_mark.index : end.index].split())
        rest = lines[end.line][end.column :] if end.line < len(lines) else ""
        yield Entry(key, value, _comment(rest) or _comment_above(key_node.start_mark.line, lines))


def _comment(rest: str) -> str:
    before, mark, comment = rest.partition("#")
    return comment.strip() if mark and not before.strip() else ""


def _comment_above(line: int, lines: list[str]) -> str:
    found: list[str] = []
    for above in reversed(lines[:line]):
        if not above.strip().startswith("#"):
            break
        found.insert(0, above.strip().lstrip("# "))
    # The comment at the top of a file describes the file.
    return " ".join(found) if len(found) < line else ""


def load_yaml(path: Path) -> Any:
    """The content of a YAML file as plain values.

    Raises:
        UserError: it is no YAML.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with _told_if_unreadable(path):
        return yaml.load(path.read_text(encoding="utf-8"), loader)


@contextlib.contextmanager
def _told_if_unreadable(path: Path) -> Iterator[None]:
    import yaml

    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names that match any glob pattern; a pattern without wildcards matches anywhere inside."""
    patterns = [p if any(c in p for c in "*?[") else f"*{p}*" for p in patterns]
    return [n for n in names if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]
