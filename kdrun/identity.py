"""What names a run: the part of its configuration that determines what it computes; no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_IDENTITY = (
    *("output_dir", "rerun", "dry", "logger", "seed", "allow_packages"),
    *("members", "members_at_once"),
)
"""Config entries that do not change what a run computes; the seed has a folder of its own."""

NOT_COMPUTING = ("progress", "keep_last")
"""Likewise within ``trainer``."""
PERMISSION = "allow_other_data"
"""Likewise within a network: it only lets a run begin."""


def fingerprint(key: Mapping[str, Any], length: int = 16) -> str:
    """Hexadecimal name of a nested mapping of plain values, whatever the order of its keys."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that determines what a run computes."""
    kept = {name: value for name, value in config.items() if name not in NOT_IDENTITY}
    if kept.get("data_seed") is None:
        kept.pop("data_seed", None)  # The seed, which has its own place.
    if "trainer" in kept:
        kept["trainer"] = {k: v for k, v in kept["trainer"].items() if k not in NOT_COMPUTING}
    for name, value in kept.items():
        if isinstance(value, dict) and PERMISSION in value:
            kept[name] = {k: v for k, v in value.items() if k != PERMISSION}
    return kept


def run_directory(config: Mapping[str, Any], names: Mapping[str, str]) -> Path:
    """``<output_dir>/<dataset>/<teacher>-<student>/<method>-<hash8>/seed<k>``."""
    safe = {group: _one_folder(name) for group, name in names.items()}
    return Path(
        config["output_dir"],
        safe["dataset"],
        f"{safe['teacher']}-{safe['student']}",
        f"{safe['method']}-{fingerprint(identity(config), 8)}",
        f"seed{config['seed']}",
    )


def output_directory(run: Path) -> Path | None:
    """The output directory that the directory of a run lies in.

    None where it has been put somewhere else, too near the root.
    """
    above = run.resolve().parents
    return above[3] if len(above) > 3 else None


def _one_folder(name: str) -> str:
    """The name of a choice as the name of one folder, never of one further up."""
    name = re.sub(r"[/\\\0]", "_", name)
    return f"_{name}" if name.startswith(".") else name
