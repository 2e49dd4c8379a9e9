"""Imports run one way, from the command line down to the mathematics; read from the source."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kdrun"

LAYERS = {
    "cli": (
        *(
            "__main__",
            "cli",
            "help",
            "run",
            "runs",
            "sweep",
            "sweep_plan",
            "sweep_groups",
            "search",
            "job",
            "launch",
        ),
        *(
            "browse",
            "completion",
            "doctor",
            "store_command",
            "deployment",
            "export",
            "table",
            "report.command",
            "members",
            "side_by_side",
        ),
    ),
    "config": ("config", "overrides", "catalogue", "checks", "constraints", "schema"),
    "experiment": ("experiment", "validation"),
    "stages": (
        *("stages", "assembly", "evaluation", "export", "fit", "given_weights"),
        *("recording", "optimization", "report"),
    ),
    "distiller": (
        *("distiller", "forward", "nonfinite", "term_sums", "logs", "loggers"),
        *("lockstep", "shared_pass"),
    ),
    "methods": ("methods", "method"),
    "parts": (
        "architectures",
        "losses",
        "layers",
        "selection",
        "tasks",
        "data",
        "models",
        "inputs",
        "outputs",
        "recording",
    ),
    "ground": (
        *("build", "targets", "parameters", "errors", "store", "checkpoints", "distributed"),
        *(
            "clock",
            "cores",
            "names",
            "sizes",
            "files",
            "identity",
            "interruption",
            "process",
            "pruning",
            "provenance",
            "startup",
            "artefacts",
            "redaction",
            "training_state",
            "locks",
        ),
    ),
}
"""Modules and packages from the top of the house to its floor; what stands in a layer imports from
that layer and from those below."""

KNOWS = {
    "methods": {"methods", "method", "losses", "layers", "selection", "outputs", "parameters"},
    "selection": {"selection"},
    "method": {"outputs", "parameters"},
    "losses": {"losses", "outputs"},
    "layers": {"layers", "inputs", "outputs"},
    "inputs": set(),
    "outputs": set(),
    "tasks": {"tasks", "losses", "inputs", "outputs", "parameters"},
    "data": {"data", "outputs", "parameters", "errors", "cores"},
    "models": {"models", "inputs", "build", "targets", "parameters", "errors"},
}
"""All of kdrun that these parts may import."""

MATHEMATICS = ("methods", "method", "losses", "layers", "selection", "outputs")
FOREIGN_TO_MATHEMATICS = {
    *("lightning", "hydra", "omegaconf", "yaml", "json", "safetensors"),
    *("os", "sys", "io", "pathlib", "shutil", "tempfile", "pickle", "argparse", "logging"),
}
"""What belongs to trainers, configuration and files."""

LIBRARIES = {
    "hydra": ("cli", "config"),
    "omegaconf": ("cli", "config"),
    "lightning": ("stages", "distiller", "distributed"),
}
"""The layers and modules that may import a library."""


class Import(NamedTuple):
    """One import: of what, by which module, and whether it happens when that module is loaded."""

    importer: str
    imported: str
    at_start: bool


@functools.cache
def sources() -> dict[str, ast.Module]:
    """The parsed source of every module of kdrun, by its name below the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = name.removesuffix("__init__").removesuffix(".")
        if name:
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


@functools.cache
def imports() -> tuple[Import, ...]:
    """Every import of every module but those for type checkers only."""
    return tuple(found for name, tree in sources().items() for found in _Finder(name).search(tree))


class _Finder(ast.NodeVisitor):
    def __init__(self, importer: str) -> None:
        self.importer, self.at_start = importer, True
        self.found: list[Import] = []

    def search(self, tree: ast.Module) -> list[Import]:
        self.visit(tree)
        return self.found

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside, self.at_start = self.at_start, False
        self.generic_visit(node)
        self.at_start = outside

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.found.append(Import(self.importer, alias.name, self.at_start))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.module and not node.level, f"{self.importer}: relative import"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            module = inner if inner.removeprefix("kdrun.") in sources() else node.module
            self.found.append(Import(self.importer, module, self.at_start))


def inside(module: str, package: str) -> bool:
    """Whether ``module`` is ``package`` or lies in it."""
    return module == package or module.startswith(f"{package}.")


def layer_of(module: str) -> str:
    """The layer of a module; its most exact entry decides."""
    entries = [
        (len(entry), layer)
        for layer, members in LAYERS.items()
        for entry in members
        if inside(module, entry)
    ]
    assert entries, f"kdrun.{module} stands in no layer of {Path(__file__).name}"
    return max(entries)[1]


def own(found: Import) -> str | None:
    """The module of kdrun that is imported; None for other packages."""
    name = found.imported
    return name.removeprefix("kdrun.") if name.startswith("kdrun.") else None


def test_imports_run_down_the_layers() -> None:
    order = list(LAYERS)
    upward = [
        f"{found.importer} ({layer_of(found.importer)}) imports {module} ({layer_of(module)})"
        for found in imports()
        if (module := own(found))
        and order.index(layer_of(found.importer)) > order.index(layer_of(module))
    ]
    assert not upward


def test_modules_that_are_loaded_together_form_no_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in sources()}
    for found in imports():
        module = own(found)
        # A package is loaded for a module inside it, and may re-export that module.
        if module and found.at_start and not inside(found.importer, module):
            graph[found.importer].add(module)
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("part", KNOWS)
def test_a_part_knows_only_its_own(part: str) -> None:
    strangers = [
        f"{found.importer} imports {module}"
        for found in imports()
        if inside(found.importer, part)
        and (module := own(found))
        and not any(inside(module, known) for known in KNOWS[part])
    ]
    assert not strangers


@pytest.mark.parametrize("part", MATHEMATICS)
def test_mathematics_knows_neither_trainer_nor_configuration_nor_files(part: str) -> None:
    strangers = [
        f"{found.importer} imports {found.imported}"
        for found in imports()
        if inside(found.importer, part) and found.imported.split(".")[0] in FOREIGN_TO_MATHEMATICS
    ]
    assert not strangers


@pytest.mark.parametrize("part", MATHEMATICS)
def test_mathematics_names_no_device(part: str) -> None:
    named = [
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for name, tree in sources().items()
        if inside(name, part)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps"))
        or (isinstance(node, ast.Constant) and node.value in ("cuda", "mps", "cpu"))
    ]
    assert not named


@pytest.mark.parametrize(("library", "places"), LIBRARIES.items())
def test_a_library_stays_where_it_belongs(library: str, places: tuple[str, ...]) -> None:
    strangers = [
        f"{found.importer} imports {found.imported}"
        for found in imports()
        if inside(found.imported, library)
        and not {layer_of(found.importer), found.importer} & set(places)
    ]
    assert not strangers


def test_the_command_line_starts_without_torch() -> None:
    at_start: dict[str, set[str]] = {}
    for found in imports():
        if found.at_start:
            at_start.setdefault(found.importer, set()).add(own(found) or found.imported)
    for module in ("cli", "config", "runs", "browse", "completion", "sweep", "run"):
        loaded, waiting = set(), [module]
        while waiting:
            name = waiting.pop()
            loaded.add(name)
            waiting += at_start.get(name, set()) - loaded
        heavy = {name for name in loaded if name.split(".")[0] in ("torch", "lightning", "timm")}
        assert not heavy, f"kdrun.{module} loads {heavy}"
