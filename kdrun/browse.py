"""``ls``, ``show`` and ``cp``: what there is to choose from, from the files' own words."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrun import schema
from kdrun.catalogue import (
    GROUPS,
    ROLES,
    SWEEP_GROUPS,
    Catalogue,
    description,
    entries,
    listing,
    load_yaml,
    matching,
    nearest,
    target_of,
    unknown_choice,
)
from kdrun.errors import UserError
from kdrun.files import typed_path
from kdrun.parameters import complaint, describe, find_source
from kdrun.targets import KEY, class_body, module_docstring, signature_of

KINDS = {
    "methods": "method",
    "models": "model",
    "datasets": "dataset",
    "recipes": "recipe",
    "tasks": "task",
    "trainings": "training",
    "trainers": "trainer",
    "loggers": "logger",
    "tables": "table",
    "launchers": "launcher",
    "sweepers": "sweeper",
    "pruners": "pruner",
    "sweeps": "sweep",
}
"""What ``kdrun ls`` lists, and the config group of each."""

Rows = list[tuple[str, ...]]


def ls(catalogue: Catalogue, words: Sequence[str]) -> str:
    """A table of the choices of one kind, or of the kinds there are.

    Args:
        catalogue: the config files.
        words: the kind, in singular or plural, and glob patterns of names.

    Raises:
        UserError: there is no such kind.
    """
    if not words:
        rows = [
            (kind, str(len(catalogue.choices(group))), f"kdrun ls {kind}")
            for kind, group in KINDS.items()
            if catalogue.choices(group)
        ]
        return columns(rows)
    kind, *patterns = words
    group = _group_of(kind, catalogue)
    names = matching(catalogue.choices(group), patterns)
    if not names:
        raise UserError(f"no {group} matches {' '.join(patterns)} (kdrun ls {kind} lists all)")
    if group == "method":
        header = ("method", "reads", "tasks", "")
        return columns([header, *(_method_row(catalogue, name) for name in names)])
    return columns([(name, description(catalogue.path(group, name))) for name in names])


def show(catalogue: Catalogue, words: Sequence[str]) -> str:
    """What one choice is, its options with type, range, default and meaning, and its files.

    Args:
        catalogue: the config files.
        words: one word such as ``method=kd``.

    Raises:
        UserError: the word does not name a choice.
    """
    group, name = _one_choice(words, catalogue, "show")
    path = catalogue.path(group, name)
    target = target_of(path)
    parts = [f"{group}={name}: {_summary(group, path)}"]
    text = _long_text(group, target)
    if text:
        parts.append(text)
    options = _options(group, path)
    if options:
        parts.append("Options\n" + columns(options, indent="  "))
    note = f"Files: {_relative(path)}"
    source = find_source(target.rpartition(".")[0]) if target and "." in target else None
    parts.append(note + (f", {_relative(source)}" if source else ""))
    return "\n\n".join(parts)


def cp(catalogue: Catalogue, words: Sequence[str]) -> str:
    """Copy a shipped config to edit it: ``cp method/kd ./conf/method/mine.yaml``.

    Raises:
        UserError: there is no such config, or the destination exists.
    """
    if len(words) != 2:
        raise UserError(
            "cp takes a config and a destination: kdrun cp method/kd my/method/mine.yaml"
        )
    group, _, name = words[0].removesuffix(".yaml").partition("/")
    _check_group(group, catalogue)
    source, destination = catalogue.path(group, name), typed_path(words[1])
    if destination.is_dir():
        destination = destination / source.name
    if destination.exists():
        raise UserError(f"{destination} exists; choose another name")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror}") from error
    return f"{_relative(source)} -> {destination}"


def columns(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Rows as aligned columns; on a terminal the last column is wrapped at its width."""
    rows = [list(row) for row in rows]
    count = max(map(len, rows))
    rows = [row + [""] * (count - len(row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(count - 1)]
    start = len(indent) + sum(width + 2 for width in widths)
    room = shutil.get_terminal_size().columns - start if sys.stdout.isatty() else None
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        last = textwrap.wrap(row[-1], max(room, 24)) if room and row[-1] else [row[-1]]
        lines.append(indent + "  ".join([*cells, last[0]]))
        lines += [" " * start + line for line in last[1:]]
    return "\n".join(line.rstrip() for line in lines)


# -- names -----------------------------------------------------------------------------------------


def _group_of(kind: str, catalogue: Catalogue) -> str:
    group = KINDS.get(kind, kind)
    group = {"students": "model", "teachers": "model", **dict.fromkeys(ROLES, "model")}.get(
        kind, group
    )
    if group not in KINDS.values() or not catalogue.choices(group):
        meant = nearest(kind, KINDS)
        hint = f" Did you mean {meant}?" if meant else ""
        raise UserError(f"ls {kind}: no such kind.{hint} (kinds: {', '.join(KINDS)})")
    return group


def _check_group(group: str, catalogue: Catalogue) -> None:
    groups = [*GROUPS, "model", *SWEEP_GROUPS, *catalogue.group_folders()]
    if group not in groups:
        meant = nearest(group, groups)
        hint = f" Did you mean {meant}?" if meant else ""
        known = listing(dict.fromkeys(groups), limit=20)
        raise UserError(f"{group}: no such config group.{hint} (groups: {known})")


def _one_choice(words: Sequence[str], catalogue: Catalogue, verb: str) -> tuple[str, str]:
    if len(words) != 1 or "=" not in words[0]:
        raise UserError(f"{verb} takes one choice, for example: kdrun {verb} method=kd")
    group, _, name = words[0].partition("=")
    group = group.removeprefix("model@")
    _check_group(group, catalogue)
    choices = catalogue.choices(group)
    if name not in choices:
        raise UserError(unknown_choice(group, name, choices))
    return group, name


# -- texts -----------------------------------------------------------------------------------------


def _summary(group: str, path: Path) -> str:
    target = target_of(path)
    if group == "method" and target:
        return _first_line(module_docstring(target.rpartition(".")[0]))
    return description(path)


def _first_line(docstring: str) -> str:
    return docstring.split("\n\n")[0].replace("\n", " ").strip()


def _long_text(group: str, target: str | None) -> str:
    """What the docstring of a method's module says after its first paragraph."""
    if group != "method" or not target or "." not in target:
        return ""
    return module_docstring(target.rpartition(".")[0]).partition("\n\n")[2].strip()


def _method_row(catalogue: Catalogue, name: str) -> tuple[str, ...]:
    path = catalogue.path("method", name)
    target = target_of(path) or ""
    reads, tasks = "logits", "classification"
    for node in class_body(target):
        if isinstance(node, ast.FunctionDef) and node.name == "taps":
            reads = "features"
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            assigned = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(assigned) == "tasks":
                tasks = ", ".join(ast.literal_eval(node.value))
    return name, reads, tasks, _summary("method", path)


def _options(group: str, path: Path) -> Rows:
    """Key, default, type and range, meaning of every entry of a config."""
    prefix = "student" if group == "model" else group
    tree = load_yaml(path) or {}
    rows: Rows = []
    for entry in entries(path):
        if entry.key.rpartition(".")[2] == KEY:
            continue
        annotation, meaning = _annotation(tree, prefix, entry.key)
        kind = "" if annotation is Any else describe(annotation)
        comment = entry.comment
        # A comment that only lists the choices says what the type says.
        if not comment or _is_choice_list(comment, annotation):
            comment = meaning or comment
        rows.append((f"{prefix}.{entry.key}", entry.value, kind, comment))
    return rows


def _annotation(tree: Mapping[str, Any], prefix: str, key: str) -> tuple[Any, str]:
    """The type of an entry and what the class's docstring says of it."""
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = node[part]
    place = ".".join([prefix, *path])
    kind = schema.SECTIONS.get(place) or schema.beside_arguments(place)
    fields = schema.fields_of(kind) if kind else {}
    if last in fields:
        return fields[last], ""
    signature = signature_of(node[KEY]) if isinstance(node.get(KEY), str) else None
    if signature is None or last not in signature.parameters:
        return Any, ""
    return signature.parameters[last].annotation, _argument_text(signature.docstring, last)


def _argument_text(docstring: str, name: str) -> str:
    """What the ``Args`` section of a docstring says of one argument."""
    _, _, arguments = docstring.partition("Args:\n")
    found = re.search(rf"^\s+{name}: (.*(?:\n\s{{8,}}\S.*)*)", arguments, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _is_choice_list(comment: str, annotation: Any) -> bool:
    words = [word.strip() for word in comment.split("|")]
    return len(words) > 1 and all(complaint(word, annotation) is None for word in words)


def _relative(path: Path) -> str:
    root = Path(__file__).resolve().parent.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
