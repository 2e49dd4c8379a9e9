"""Finished and interrupted runs, as their directories tell: continue one, compare two; no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdrun.artefacts import RESULT
from kdrun.browse import columns
from kdrun.catalogue import Catalogue, load_yaml
from kdrun.config import Config, compose, spell
from kdrun.errors import UserError
from kdrun.files import parse_json, typed_path
from kdrun.identity import output_directory

CONFIG, ENVIRONMENT = "config.yaml", "env.json"

PLACE = ("output_dir", "rerun", "dry", "logger", "allow_packages")
"""Config entries that may differ between two sittings of the same run."""


def open_run(text: str) -> Path:
    """The directory of a run, given itself or a file in it.

    Raises:
        UserError: there is no run.
    """
    path = typed_path(text)
    path = path.parent if path.is_file() else path
    if (path / CONFIG).is_file():
        return path
    below = sorted(path.glob(f"**/{CONFIG}"))[:2] if path.is_dir() else []
    hint = f"; did you mean {below[0].parent}?" if below else ""
    reason = f"holds no {CONFIG}" if path.is_dir() else "no such directory"
    raise UserError(f"{text} is not a run: {reason}{hint}")


def stored_words(run: Path) -> list[str]:
    """The words of the command that started a run.

    Raises:
        UserError: what tells them is missing or damaged.
    """
    path = run / ENVIRONMENT
    command = read_json(path).get("command")
    if not isinstance(command, str):
        raise UserError(f"{path} is damaged: it holds no command")
    return shlex.split(command)


def resume_config(run: Path, words: list[str], catalogue: Catalogue) -> tuple[Config, list[str]]:
    """The configuration of a stored run, and the words that continue it from here.

    Args:
        run: its directory.
        words: ``key=value`` words of the command that started it.
        catalogue: the config files as they are now.

    Raises:
        UserError: the config files have changed, so that the same words mean something else now.
    """
    # <output_dir>/<dataset>/<teacher>-<student>/<method>-<hash>/seed<k>
    root = output_directory(run)
    if root is None:
        raise UserError(f"{run} was moved; put it back below its output directory to continue it")
    words = [word for word in words if not word.startswith(("output_dir=", "rerun="))]
    if root != Path("outputs").resolve():
        words.append(f"output_dir={quoted(str(root))}")
    config = compose(words, catalogue)
    stored = read_config(run)
    before = {key: value for key, value in stored.items() if key not in PLACE}
    now = {key: value for key, value in config.values.items() if key not in PLACE}
    changed = [
        f"{key} ({spell(old)} -> {spell(new)})" for key, old, new in differences(before, now)
    ]
    if changed:
        raise UserError(
            f"{run} was made with other config files: {', '.join(changed[:6])}; "
            f"as a new run: kdrun {shlex.join(words)}"
        )
    return config, words


def diff(first: Path, second: Path) -> str:
    """Config entries and results in which two runs differ, side by side."""
    parts = []
    rows = [
        (key, spell(old), spell(new))
        for key, old, new in differences(read_config(first), read_config(second))
    ]
    parts.append("Config\n" + columns(rows, indent="  ") if rows else "Config: the same")
    results = [
        read_json(run / RESULT) if (run / RESULT).is_file() else {} for run in (first, second)
    ]
    numbers = [dict(_numbers(result)) for result in results]
    if not any(numbers):
        return "\n\n".join([*parts, "Results: neither run is finished"])
    table = []
    for key in dict.fromkeys([*numbers[0], *numbers[1]]):
        a, b = (found.get(key) for found in numbers)
        if a == b:
            continue
        change = f"{b - a:+.4g}" if a is not None and b is not None else ""
        table.append((key, _show(a), _show(b), change))
    if not table:
        return "\n\n".join([*parts, "Results: the same"])
    table.insert(0, ("", "first", "second", "difference"))
    parts.append("Results\n" + columns(table, indent="  "))
    return "\n\n".join(parts)


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value in first, value in second) of the leaves that differ."""
    for key in dict.fromkeys([*first, *second]):
        a, b = first.get(key, "unset"), second.get(key, "unset")
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def quoted(text: str) -> str:
    """A value for the command line that is read back as this very text."""
    if re.fullmatch(r"[\w./:@-]+", text):
        return text
    # Hydra's grammar takes a backslash for itself unless a quote follows.
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (m[2] and r"\""), text)
    return f'"{escaped}"'


def read_config(run: Path) -> dict[str, Any]:
    """The configuration that a run was made with.

    Raises:
        UserError: it is damaged.
    """
    path = run / CONFIG
    return _mapping(load_yaml(path), path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return _mapping(parse_json(path.read_bytes()), path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run did not get that far") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no named values")
    return value


def _numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _numbers(item, f"{prefix}{key}.")
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and key != "schema":
            yield f"{prefix}{key}", item


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
