"""``kdrun store ls|verify|gc``: what runs share on disk, whether it is sound, and cleaning up."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.artefacts import MARKER, RESULT, damaged, read_marker
from kdrun.browse import columns
from kdrun.errors import UserError
from kdrun.files import read_json, typed_path, walk
from kdrun.locks import Lock
from kdrun.sizes import in_words

USAGE = "kdrun store ls|verify|gc [--yes] [--budget 20GB] [output_dir=outputs]"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {f"{letter}i": 1 << 10 * power for power, letter in enumerate("kmgt", start=1)}
REFERENCES = ("artefacts.json", RESULT)
"""Files of a run that name the artefacts it was made from."""


@dataclass(frozen=True)
class Entry:
    """A directory of the store.

    Attributes:
        directory: ``<root>/<kind>/<fingerprint>``.
        finished: whether its marker was written.
        size: bytes of its files.
        used: when a run last took it, or a file of it was written, seconds since 1970.
    """

    directory: Path
    finished: bool
    size: int
    used: float

    @property
    def name(self) -> str:
        """Kind and fingerprint."""
        return f"{self.directory.parent.name}/{self.directory.name}"


def main(words: Sequence[str]) -> int:
    """Do what was typed after ``store``; 1 where ``verify`` finds damage.

    Raises:
        UserError: the words make no sense, or something cannot be removed.
    """
    folder, yes, verbs, budget = Path("outputs"), False, [], None
    rest = iter(words)
    for word in rest:
        if word == "--budget" or word.startswith("--budget="):
            budget = read_size(word.partition("=")[2] or next(rest, ""))
        elif word.startswith("output_dir="):
            folder = typed_path(word.partition("=")[2])
        elif word == "--yes":
            yes = True
        else:
            verbs.append(word)
    if (
        len(verbs) != 1
        or verbs[0] not in ("ls", "verify", "gc")
        or ((yes or budget is not None) and verbs != ["gc"])
    ):
        raise UserError(f"{' '.join(words) or 'store'}: not understood; {USAGE}")
    found = entries(folder / "store")
    if not found:
        print(f"{folder / 'store'} is empty")
        return 0
    if verbs[0] == "ls":
        return _ls(folder, found)
    return _verify(found) if verbs[0] == "verify" else _gc(folder, found, yes, budget)


def read_size(text: str) -> int:
    """Bytes of ``20GB``, ``1.5 GiB``, ``500M`` or a plain number.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise UserError(f"--budget {text}: not a size; write it as 20GB, 1.5TiB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])


def entries(root: Path) -> list[Entry]:
    """All that lies in a store, by name."""
    found = []
    for directory in sorted(root.glob("*/*")):
        if directory.is_dir() and not directory.name.startswith("."):
            facts = list(_facts(directory))
            size = sum(fact.st_size for fact in facts)
            # The marker's time is that of the last use: see ``kdrun.store.note_use``.
            used = max((fact.st_mtime for fact in facts), default=directory.stat().st_mtime)
            found.append(Entry(directory, (directory / MARKER).is_file(), size, used))
    return found


def _facts(directory: Path) -> Iterator[os.stat_result]:
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # A process at work has just replaced it.
            fact = path.stat()
            if stat.S_ISREG(fact.st_mode):
                yield fact


@dataclass(frozen=True)
class Use:
    """Which runs need which artefacts.

    Attributes:
        served: the runs that each artefact serves, also by way of other artefacts, by its name.
        damaged: what is wrong with each file that should tell of this and cannot be read, a line
            each.
        unknown: those of them without which it is unknown what a run needs.
    """

    served: dict[str, set[Path]]
    damaged: list[str]
    unknown: list[Path]


def users(folder: Path, found: Sequence[Entry]) -> Use:
    """Which runs below ``folder`` need which artefacts."""
    names = {entry.name for entry in found}
    needs: dict[str, set[str]] = {}
    broken: dict[str, Path] = {}
    damaged = []
    for entry in found:
        if not entry.finished:
            continue
        try:
            needs[entry.name] = _strings(read_marker(entry.directory)["key"]) & names
        except (UserError, OSError) as error:
            broken[entry.name] = entry.directory / MARKER
            damaged.append(str(error))
    served: dict[str, set[Path]] = {name: set() for name in names}
    unknown = []
    for run, folders, files in walk(folder):
        if run == folder and "store" in folders:
            folders.remove("store")
        references = [name for name in REFERENCES if name in files]
        told = 0
        for reference in references:
            try:
                waiting = list(_named(run / reference) & names)
            except (UserError, OSError) as error:
                damaged.append(str(error))
                continue
            told += 1
            while waiting:
                name = waiting.pop()
                if run not in served[name]:
                    served[name].add(run)
                    waiting += needs.get(name, ())
        if references and not told:
            unknown.append(run / references[0])
    unknown += [path for name, path in broken.items() if served[name]]
    return Use(served, damaged, unknown)


def _named(path: Path) -> set[str]:
    """The artefacts that a file of a run refers to, and its other texts.

    Raises:
        UserError: it is damaged.
    """
    content = read_json(path)
    if path.name == RESULT and isinstance(content, dict):
        content = content.get("artefacts")
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it names no artefacts); remove it and run again")
    return _strings(content)


def _ls(folder: Path, found: Sequence[Entry]) -> int:
    use = users(folder, found)
    rows = [("artefact", "size", "last used", "runs")]
    for entry in found:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        runs = str(len(use.served[entry.name])) if entry.finished else f"unfinished{_work(entry)}"
        rows.append((entry.name, in_words(entry.size), date, runs))
    print("\n".join([columns(rows), *use.damaged]))
    return 0


def _verify(found: Sequence[Entry]) -> int:
    bad = 0
    for entry in found:
        if not entry.finished:
            print(f"{entry.name}: unfinished{_work(entry)}")
            continue
        try:
            files = [str(path.relative_to(entry.directory)) for path in damaged(entry.directory)]
        except (UserError, OSError) as error:
            files = [f"{MARKER} ({error})"]
        bad += bool(files)
        print(f"{entry.name}: " + (f"DAMAGED: {', '.join(files)}" if files else "sound"))
    if bad:
        print(
            f"{bad} damaged; remove their directories, and the runs that need them make them anew"
        )
    return 1 if bad else 0


def _gc(folder: Path, found: Sequence[Entry], yes: bool, budget: int | None) -> int:
    use = users(folder, found)
    for line in use.damaged:
        print(line)
    freed = 0
    kept = []
    for entry in found:
        if entry.finished and use.served[entry.name]:
            kept.append(entry)
            continue
        if entry.finished and use.unknown:
            print(f"{entry.name}: kept, who needs it stands in {use.unknown[0]}, which is damaged")
            continue
        why = "no run refers to it" if entry.finished else "unfinished"
        freed += _remove(entry, why, yes)
    if budget is not None:
        size = sum(entry.size for entry in found) - freed
        freed += _keep_within(budget, size, kept, use.served, yes)
    print(f"{in_words(freed)} {'freed' if yes else 'to be freed: kdrun store gc --yes'}")
    return 0


def _keep_within(
    budget: int, size: int, kept: Sequence[Entry], served: dict[str, set[Path]], yes: bool
) -> int:
    """Remove what was used least recently until ``budget`` bytes are kept; returns bytes freed.

    What a run that has no result yet refers to stays. A finished run keeps its own student and
    result; what it shares is made again where it is asked for again.
    """
    freed = 0
    for entry in sorted(kept, key=lambda entry: entry.used):
        if size - freed <= budget:
            break
        if all((run / MARKER).is_file() for run in served[entry.name]):
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            freed += _remove(entry, f"last used {used}", yes)
    if size - freed > budget:
        left = in_words(size - freed)
        print(f"{left} stay, above the budget: runs that are not finished need them")
    return freed


def _remove(entry: Entry, why: str, yes: bool) -> int:
    """Remove an artefact, or say that it would be; returns the bytes that frees."""
    lock = _lock(entry)
    if not lock.acquire():
        print(f"{entry.name}: kept, a process works on it")
        return 0
    try:
        if yes:
            shutil.rmtree(entry.directory)
    except OSError as error:
        raise UserError(f"cannot remove {entry.directory}: {error.strerror or error}") from error
    finally:
        lock.release()
    print(f"{entry.name}: {'removed' if yes else 'would be removed'}, {why}")
    return entry.size


def _work(entry: Entry) -> str:
    """Who is at an unfinished artefact."""
    lock = _lock(entry)
    if not lock.is_held():
        return ", nobody works on it"
    who = lock.told()
    return f", in work{f' ({who})' if who else ''}"


def _lock(entry: Entry) -> Lock:
    return Lock(entry.directory.with_name(f".{entry.directory.name}.lock"))


def _strings(value: Any) -> set[str]:
    return set(_walk(value))


def _walk(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)
