"""What a ``_target_`` may name, and what its source text says about it, without importing it.

A config can come from anywhere; building whatever it names would be running whatever it says. Only
the packages below, and those the user names in ``allow_packages``, are ever looked into.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kdrun.errors import UserError
from kdrun.parameters import Signature, find_source, read_signature

ALLOWED = (
    # Not all of kdrun: its store writes files, its launcher starts processes.
    "kdrun.architectures",
    "kdrun.data",
    "kdrun.layers",
    "kdrun.losses",
    "kdrun.methods",
    "kdrun.models",
    "kdrun.stages",
    "kdrun.tasks",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchmetrics",
    "timm",
    "transformers",
    "torch_geometric.nn",
    "open_clip",
    "lightning.pytorch.loggers",
)

KEY = "_target_"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_MAX_REEXPORTS = 6


def is_dotted_path(text: str) -> bool:
    """Whether ``text`` looks like ``package.module.Name``."""
    return _DOTTED.fullmatch(text) is not None


def is_allowed(path: str, packages: Iterable[str] = ()) -> bool:
    """Whether a dotted path lies in a package that may be built from."""
    return any(path == name or path.startswith(f"{name}.") for name in (*ALLOWED, *packages))


def refusal(target: Any, packages: Iterable[str] = ()) -> str | None:
    """Why ``target`` may not be built, in a few words that say what to change; None if it may.

    Args:
        target: the value of a ``_target_`` entry.
        packages: top-level packages allowed besides ``ALLOWED``.
    """
    if not isinstance(target, str) or not is_dotted_path(target):
        return f"must be a dotted path such as package.module.Class, got {target}"
    if "__" in target:
        return f"{target}: names with double underscores are not built from a config"
    top = target.split(".")[0]
    if top in sys.stdlib_module_names:
        return f"{target}: nothing is built from Python's standard library"
    if top == "kdrun" and not is_allowed(target):
        own = ", ".join(name.removeprefix("kdrun.") for name in ALLOWED if name.startswith("kdrun"))
        return f"{target}: of kdrun only {own} are built from"
    if not is_allowed(target, packages):
        return f"{target}: nothing is built from {top} unless allow_packages=[{top}] says so"
    return None


def targets(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every ``_target_`` below a config value, as (its dotted place, what it names)."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            place = f"{path}.{key}" if path else str(key)
            if key == KEY:
                yield place, item
            else:
                yield from targets(item, place)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from targets(item, f"{path}[{number}]")


@functools.lru_cache(maxsize=256)
def signature_of(target: str) -> Signature | None:
    """The signature of a target from its source text, following re-exports; None if not found."""
    for _ in range(_MAX_REEXPORTS):
        if _parse(target.rpartition(".")[0]) is None:
            return None
        signature = read_signature(target)
        if signature is not None:
            return signature
        elsewhere = _imported_from(target)
        if elsewhere is None:
            return None
        target = elsewhere
    return None


@functools.lru_cache(maxsize=256)
def is_defined(target: str) -> bool:
    """Whether a class or function of that name exists, as far as the source text tells."""
    for _ in range(_MAX_REEXPORTS):
        module, _, name = target.rpartition(".")
        tree = _parse(module)
        if tree is None:
            return False
        kinds = (ast.ClassDef, ast.FunctionDef)
        if any(isinstance(node, kinds) and node.name == name for node in tree.body):
            return True
        elsewhere = _imported_from(target)
        if elsewhere is None:
            return False
        target = elsewhere
    return False


def module_docstring(module: str) -> str:
    """The docstring of a module, from its source; empty where there is none."""
    tree = _parse(module)
    return (ast.get_docstring(tree) or "") if tree is not None else ""


@functools.lru_cache(maxsize=64)
def _parse(module: str) -> ast.Module | None:
    source = find_source(module) if module else None
    if source is None or source.suffix != ".py":
        return None
    try:
        return ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{source}{line}: cannot be read ({error})") from error


def _imported_from(target: str) -> str | None:
    """Where the module of ``target`` imports that name from: ``from .sgd import SGD``."""
    module, _, name = target.rpartition(".")
    tree = _parse(module)
    if tree is None:
        return None
    source = find_source(module)
    is_package = source is not None and source.name == "__init__.py"
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return f"{_absolute(node, module, is_package)}.{alias.name}"
    return None


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")
    parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
    return ".".join([*parents, node.module] if node.module else parents)


def class_body(target: str) -> list[ast.stmt]:
    """The statements of a class's body, from its source; empty where it is not found."""
    module, _, name = target.rpartition(".")
    tree = _parse(module)
    found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name] if tree else []
    return found[0].body if found else []
