"""Shell completion: ``complete -C`` calls ``kdrun complete`` with the command line so far.

In bash one line in ``~/.bashrc`` turns it on, in zsh the line before it is needed too::

    autoload -U +X bashcompinit && bashcompinit
    complete -o nospace -C 'kdrun complete' kdrun
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kdrun.browse import KINDS
from kdrun.catalogue import GROUPS, SWEEP_GROUPS, Catalogue, entries, is_network

TAKES_RUN = ("resume", "eval", "export", "diff")


def complete(line: str, word: str, catalogue: Catalogue, verbs: Iterable[str]) -> list[str]:
    """What may be typed next.

    Args:
        line: the command line up to the cursor.
        word: the part of the last word that the shell replaces; bash breaks words at ``=``.
        catalogue: the config files.
        verbs: the commands there are.
    """
    words = line.split()[1:]
    typed = "" if line.endswith(" ") or not words else words.pop()
    found = [name for name in _candidates(words, typed, catalogue, verbs) if name.startswith(typed)]
    kept = len(typed) - len(word)
    return sorted({name[kept:] for name in found})


def _candidates(
    words: Sequence[str], typed: str, catalogue: Catalogue, verbs: Iterable[str]
) -> Iterable[str]:
    verb = words[0] if words and "=" not in words[0] and not words[0].startswith("-") else None
    if verb == "ls":
        return [f"{kind} " for kind in KINDS]
    if verb in TAKES_RUN:
        return []
    groups = [*GROUPS, "model"] if verb == "show" else list(GROUPS)
    if "-m" in words or "--multirun" in words or verb == "show":
        groups += list(SWEEP_GROUPS)
    key, equals, _ = typed.partition("=")
    if equals:
        if key not in groups and not is_network(key):
            return []
        done, comma, _ = typed.rpartition(",")
        start = f"{done}," if comma else f"{key}="
        return [f"{start}{name}" for name in catalogue.choices(key)]
    if verb == "cp":
        folders = [group for group in catalogue.group_folders() if typed.startswith(f"{group}/")]
        names = [f"{group}/{name} " for group in folders for name in catalogue.choices(group)]
        return names or [f"{group}/" for group in catalogue.group_folders()]
    offered = [f"{group}=" for group in groups]
    if verb == "show":
        return offered
    if not words:
        offered += [f"{name} " for name in verbs] + ["-m ", "--help ", "--version "]
    return [*offered, *_options(words, typed, catalogue)]


def _options(words: Sequence[str], typed: str, catalogue: Catalogue) -> list[str]:
    """``section.option=`` of the section that is being typed, and the plain keys."""
    group, dot, _ = typed.partition(".")
    plain = [
        f"{entry.key}="
        for entry in entries(catalogue.directories[0] / "config.yaml")
        if not dot or entry.key.startswith(f"{group}.")
    ]
    if not dot or group not in GROUPS:
        return plain
    chosen = catalogue.defaults() | dict(word.split("=", 1) for word in words if "=" in word)
    if chosen[group] not in catalogue.choices(group):
        return plain
    path = catalogue.path(group, chosen[group])
    return plain + [f"{group}.{entry.key}=" for entry in entries(path)]
