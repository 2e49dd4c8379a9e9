"""Types and ranges of options: one vocabulary for signatures, the command line and the tests.

A constructor writes ``temperature: Positive = 4.0``; the same annotation is enforced when the class
is built (``checked_constructor``) and read from the source text, without importing torch, when the
command line checks an override (``read_signature``).
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Interval:
    """A range of numbers; a bound is included unless it is said to be open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        if self.low == -math.inf:
            return f"{'<' if self.high_open else '<='} {self.high:g}"
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


Positive = Annotated[float, Interval(low=0, low_open=True)]
NonNegative = Annotated[float, Interval(low=0)]
Fraction = Annotated[float, Interval(low=0, high=1)]
ProperFraction = Annotated[float, Interval(low=0, high=1, high_open=True)]
PositiveInt = Annotated[int, Interval(low=1)]
NonNegativeInt = Annotated[int, Interval(low=0)]

MISSING = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One option: its name, annotation (``Any`` where it says nothing) and default."""

    name: str
    annotation: Any = Any
    default: Any = MISSING

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING


@dataclass(frozen=True)
class Signature:
    """The options of a class or function, read from its source or from the object."""

    parameters: dict[str, Parameter]
    docstring: str = ""
    takes_any_keyword: bool = False


# -- values against annotations ----------------------------------------------------------------


def describe(annotation: Any) -> str:
    """An annotation in words: ``number > 0``, ``integer >= 1``, ``one of mean, sum``."""
    if annotation is Any or annotation is MISSING:
        return "any value"
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *ranges = get_args(annotation)
        return " ".join([describe(base), *map(str, ranges)])
    if origin is Literal:
        return "one of " + ", ".join(_spell(choice) for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(annotation))
    if origin in (list, tuple):
        inner = [option for option in get_args(annotation) if option is not Ellipsis]
        return f"list of {describe(inner[0])}" if inner else "list"
    if origin is dict or annotation is dict:
        return "mapping"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", list: "list"}
    if annotation is type(None) or annotation is None:
        return "null"
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def complaint(value: Any, annotation: Any) -> str | None:
    """Why ``value`` does not fit ``annotation``, in a few words; None when it does."""
    if _fits(value, annotation):
        return None
    return f"must be {describe(annotation)}, got {_spell(value)}"


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is Any or annotation is MISSING:
        return True
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *ranges = get_args(annotation)
        return _fits(value, base) and all(value in interval for interval in ranges)
    if origin is Literal:
        return any(
            value == choice and type(value) is type(choice) for choice in get_args(annotation)
        )
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(annotation))
    if origin is list or annotation is list:
        inner = get_args(annotation)
        is_list = isinstance(value, (list, tuple))
        return is_list and (not inner or all(_fits(item, inner[0]) for item in value))
    if origin is tuple or annotation is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        inner = get_args(annotation)
        if not inner:
            return True
        if inner[-1] is Ellipsis:
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is dict or annotation is dict:
        return isinstance(value, Mapping)
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    return True


def _spell(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


# -- signatures from objects --------------------------------------------------------------------


def checked_constructor(constructor: Callable) -> Callable:
    """Wrap ``__init__`` so that every argument is held against its annotation.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    if getattr(constructor, "_checked", False):
        return constructor
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        hints = typing.get_type_hints(constructor, include_extras=True)
        for name, value in bound.arguments.items():
            reason = complaint(value, hints.get(name, Any))
            if reason:
                raise ValueError(f"{type(self).__name__}: {name} {reason}")
        constructor(self, *args, **kwargs)

    construct._checked = True
    return construct


# -- signatures from source text -------------------------------------------------------------------


def find_source(module: str) -> Path | None:
    """The file of a module of an installed package, found without importing the module itself."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    roots = list(spec.submodule_search_locations or [])
    if not rest:
        return Path(spec.origin) if spec.origin and spec.has_location else None
    for root in roots:
        stem = Path(root, *rest)
        for candidate in (stem.with_suffix(".py"), stem / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@functools.lru_cache(maxsize=256)
def read_signature(target: str) -> Signature | None:
    """The signature of ``package.module.Name``, read from the source text with ``ast``.

    Returns None when the source cannot be found or the name is not defined in that file (it may be
    imported there from elsewhere); such a target is checked when it is built.
    """
    module, _, name = target.rpartition(".")
    source = find_source(module) if module else None
    if source is None:
        return None
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return _signature_of(item, ast.get_docstring(node) or "", drop_first=True)
            dataclass_fields = _dataclass_fields(node)
            if dataclass_fields is not None:
                return Signature(dataclass_fields, ast.get_docstring(node) or "")
            return None if node.bases else Signature({}, ast.get_docstring(node) or "")
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _signature_of(node, ast.get_docstring(node) or "", drop_first=False)
    return None


def _dataclass_fields(node: ast.ClassDef) -> dict[str, Parameter] | None:
    names = [
        ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list
    ]
    if "dataclass" not in names:
        return None
    fields = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            default = _literal(item.value) if item.value is not None else MISSING
            fields[item.target.id] = Parameter(
                item.target.id, _annotation(item.annotation), default
            )
    return fields


def _signature_of(node: ast.FunctionDef, docstring: str, drop_first: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    pairs = list(zip(positional, defaults + list(arguments.defaults), strict=True))
    pairs = pairs[1:] if drop_first else pairs
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters = {
        argument.arg: Parameter(
            argument.arg,
            _annotation(argument.annotation),
            MISSING if default is None else _literal(default),
        )
        for argument, default in pairs
    }
    return Signature(parameters, docstring, takes_any_keyword=arguments.kwarg is not None)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


_BASE = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "tuple": tuple}
_BASE |= {"dict": dict, "Any": Any, "None": type(None)}


def _annotation(node: ast.expr | None) -> Any:
    """The type that an annotation names; ``Any`` where it is not in the vocabulary."""
    if node is None:
        return Any
    if isinstance(node, ast.Constant):
        if node.value is None:
            return type(None)
        if isinstance(node.value, str):
            return _annotation(ast.parse(node.value, mode="eval").body)
        return Any
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = ast.unparse(node).split(".")[-1]
        named = globals().get(name)
        return _BASE.get(name, named if get_origin(named) is Annotated else Any)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = _annotation(node.left), _annotation(node.right)
        return Any if Any in (left, right) else left | right
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value).split(".")[-1]
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return Literal[tuple(ast.literal_eval(item) for item in items)]
        if name == "Annotated":
            return _annotated(items)
        if name in ("list", "Sequence"):
            return list[_annotation(items[0])]
        if name == "tuple":
            return tuple[
                tuple(Ellipsis if ast.unparse(i) == "..." else _annotation(i) for i in items)
            ]
        if name in ("dict", "Mapping"):
            return dict
        if name == "Optional":
            return _annotation(items[0]) | None
    return Any


def _annotated(items: list[ast.expr]) -> Any:
    base = _annotation(items[0])
    call = items[1]
    if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "Interval":
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        return Annotated[base, Interval(*map(ast.literal_eval, call.args), **keywords)]
    return base
