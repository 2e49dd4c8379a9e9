"""Keys and passwords stay out of what a run writes.

A secret is the value of an environment variable, or of a config entry, whose name says so
(``WANDB_API_KEY``, ``HF_TOKEN``, ``logger.api_key``). Its text is replaced wherever it would be
written: ``config.yaml``, the record of the environment with its command and source difference,
``log.txt``, ``result.json``, the records of sweeps and tables.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

LEAST_CHARACTERS = 8
"""Shorter values are no secrets, and taking them out would maim ordinary text."""

_VARIABLE = re.compile(
    r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|PAT|PWD)(?:_ID)?$",
    re.IGNORECASE,
)
# Tokenisers call their symbols tokens too (eos_token).
_ENTRY = re.compile(
    r"(?:^|_)(?:api_?key|secret(?:_key)?|access_key|private_key|password|passwd|passphrase"
    r"|(?:access|auth|hf|hub|api|bearer)_token)$|^token$",
    re.IGNORECASE,
)
_NO_SECRETS = ("PWD", "OLDPWD")
_of_configs: dict[str, str] = {}


def remember_secrets(config: Mapping[str, Any]) -> None:
    """Treat the secrets of a configuration as such from now on, in this process."""
    _of_configs.update((value, name) for name, value in _entries(config))


def redact(text: str) -> str:
    """``text`` with every secret replaced by ``[<name> removed]``."""
    # The longest first: one secret may begin like another.
    for value, name in sorted(_secrets().items(), key=lambda pair: -len(pair[0])):
        for form in {value, json.dumps(value)[1:-1]}:
            text = text.replace(form, f"[{name} removed]")
    return text


def _secrets() -> dict[str, str]:
    found = dict(_of_configs)
    for name, value in os.environ.items():
        if name not in _NO_SECRETS and _VARIABLE.search(name) and len(value) >= LEAST_CHARACTERS:
            found[value] = name
    return found


def _entries(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if isinstance(item, str) and _ENTRY.search(str(name)):
                if len(item) >= LEAST_CHARACTERS:
                    yield str(name), item
            else:
                yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)
