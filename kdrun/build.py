"""From config nodes to objects: ``_target_`` and its keyword arguments, within the allow-list."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kdrun.errors import UserError
from kdrun.targets import KEY, is_allowed, refusal

_allowed_packages: ContextVar[tuple[str, ...]] = ContextVar("allowed_packages", default=())


@contextmanager
def allowing(packages: Iterable[str]) -> Iterator[None]:
    """Let targets name these packages too (``allow_packages`` of the config) inside the block."""
    token = _allowed_packages.set(tuple(packages))
    try:
        yield
    finally:
        _allowed_packages.reset(token)


def instantiate(node: Mapping[str, Any], **extra: Any) -> Any:
    """Build the object that a config node describes; nested nodes are built first.

    Args:
        node: ``_target_`` and keyword arguments.
        extra: arguments that the caller knows and the config does not (``params`` of an optimiser);
            they take the place of an entry that is missing or null.

    Raises:
        UserError: the target is not allowed or does not exist, an argument is unknown, missing,
            given twice or refused by the constructor; one line that names the target.
    """
    if KEY not in node:
        raise UserError(f"a config node without {KEY} cannot be built: {dict(node)}")
    target = node[KEY]
    function = resolve(target)
    arguments = {key: _build(value) for key, value in node.items() if key != KEY}
    for key, value in extra.items():
        if arguments.get(key) is not None:
            raise UserError(f"{target}: {key} is set by kdrun and cannot be given in the config")
        arguments[key] = value
    try:
        bind(target, function, arguments)
        return function(**arguments)
    except ValueError as error:
        message = str(error) or type(error).__name__
        raise UserError(f"{target}: {message.splitlines()[0]}") from error


def bind(target: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check that ``function`` takes exactly these keyword arguments.

    Raises:
        UserError: an argument is unknown or missing.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # Some built-in callables do not tell; calling them will.
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{target}: {error}") from error


def resolve(target: str) -> Callable[..., Any]:
    """Import what ``target`` names.

    The allow-list holds for the path and for where the object was defined, so that a module reached
    through an allowed one (``kdrun.store.os.system``) is refused.

    Raises:
        UserError: the target is not allowed, cannot be imported, or is not callable.
    """
    packages = _allowed_packages.get()
    reason = refusal(target, packages)
    if reason:
        raise UserError(reason)
    found = _import(target)
    if inspect.ismodule(found) or not callable(found):
        raise UserError(f"{target} is not a class or function")
    home = getattr(found, "__module__", None) or ""
    if not is_allowed(home, packages):
        raise UserError(
            f"{target} comes from {home or 'nowhere known'}, which may not be built from"
        )
    return found


def _import(target: str) -> Any:
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                if length > 1:
                    continue
                raise UserError(f"{target}: the package {error.name} is not installed") from error
            raise UserError(f"{target}: importing {name} needs {error.name}") from error
        except ImportError as error:
            raise UserError(f"{target}: cannot import {name} ({error})") from error
        for part in parts[length:]:
            if not hasattr(found, part):
                raise UserError(f"{target}: {name} has no {part}")
            found, name = getattr(found, part), f"{name}.{part}"
        return found
    raise UserError(f"{target} is not a dotted path")


def _build(value: Any) -> Any:
    if isinstance(value, Mapping):
        if KEY in value:
            return instantiate(value)
        return {key: _build(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_build(item) for item in value]
    return value
