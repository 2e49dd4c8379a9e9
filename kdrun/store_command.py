"""``kdrun store ls|verify|gc``: what runs share on disk, whether it is sound, and cleaning up."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdrun.artefacts import MARKER, damaged
from kdrun.browse import columns
from kdrun.errors import UserError
from kdrun.files import read_json

USAGE = "kdrun store ls|verify|gc [--yes] [output_dir=outputs]"
REFERENCES = ("artefacts.json", "result.json")
"""Files of a run that name the artefacts it was made from."""


@dataclass(frozen=True)
class Entry:
    """A directory of the store.

    Attributes:
        directory: ``<root>/<kind>/<fingerprint>``.
        finished: whether its marker was written.
        size: bytes of its files.
        modified: when one of them was last written, seconds since 1970.
    """

    directory: Path
    finished: bool
    size: int
    modified: float

    @property
    def name(self) -> str:
        """Kind and fingerprint."""
        return f"{self.directory.parent.name}/{self.directory.name}"


def main(words: Sequence[str]) -> int:
    """Do what was typed after ``store``; 1 where ``verify`` finds damage.

    Raises:
        UserError: the words make no sense, or something cannot be removed.
    """
    folder, yes, verbs = Path("outputs"), False, []
    for word in words:
        if word.startswith("output_dir="):
            folder = Path(word.partition("=")[2]).expanduser()
        elif word == "--yes":
            yes = True
        else:
            verbs.append(word)
    if len(verbs) != 1 or verbs[0] not in ("ls", "verify", "gc") or (yes and verbs != ["gc"]):
        raise UserError(f"{' '.join(words) or 'store'}: not understood; {USAGE}")
    found = entries(folder / "store")
    if not found:
        print(f"{folder / 'store'} is empty")
        return 0
    if verbs[0] == "ls":
        return _ls(folder, found)
    return _verify(found) if verbs[0] == "verify" else _gc(folder, found, yes)


def entries(root: Path) -> list[Entry]:
    """All that lies in a store, by name."""
    found = []
    for directory in sorted(root.glob("*/*")):
        if directory.is_dir() and not directory.name.startswith("."):
            facts = [path.stat() for path in directory.rglob("*") if path.is_file()]
            size = sum(fact.st_size for fact in facts)
            modified = max((fact.st_mtime for fact in facts), default=directory.stat().st_mtime)
            found.append(Entry(directory, (directory / MARKER).is_file(), size, modified))
    return found


def users(folder: Path, found: Sequence[Entry]) -> dict[str, set[Path]]:
    """Which runs below ``folder`` each artefact serves, also by way of other artefacts."""
    names = {entry.name for entry in found}
    needs = {
        entry.name: _strings(read_json(entry.directory / MARKER)["key"]) & names
        for entry in found
        if entry.finished
    }
    served: dict[str, set[Path]] = {name: set() for name in names}
    for reference in REFERENCES:
        for path in folder.rglob(reference):
            content = read_json(path)
            named = content.get("artefacts", {}) if reference == "result.json" else content
            waiting = list(_strings(named) & names)
            while waiting:
                name = waiting.pop()
                if path.parent not in served[name]:
                    served[name].add(path.parent)
                    waiting += needs.get(name, ())
    return served


def _ls(folder: Path, found: Sequence[Entry]) -> int:
    served = users(folder, found)
    rows = [("artefact", "size", "last written", "runs")]
    for entry in found:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
        runs = str(len(served[entry.name])) if entry.finished else f"unfinished{_work(entry)}"
        rows.append((entry.name, _size(entry.size), date, runs))
    print(columns(rows))
    return 0


def _verify(found: Sequence[Entry]) -> int:
    bad = 0
    for entry in found:
        if not entry.finished:
            print(f"{entry.name}: unfinished{_work(entry)}")
            continue
        try:
            files = [str(path.relative_to(entry.directory)) for path in damaged(entry.directory)]
        except UserError as error:
            files = [f"{MARKER} ({error})"]
        bad += bool(files)
        print(f"{entry.name}: " + (f"DAMAGED: {', '.join(files)}" if files else "sound"))
    if bad:
        print(
            f"{bad} damaged; remove their directories, and the runs that need them make them anew"
        )
    return 1 if bad else 0


def _gc(folder: Path, found: Sequence[Entry], yes: bool) -> int:
    served = users(folder, found)
    freed = 0
    for entry in found:
        if entry.finished and served[entry.name]:
            continue
        why = "no run refers to it" if entry.finished else "unfinished"
        lock = FileLock(entry.directory.with_name(f".{entry.directory.name}.lock"))
        try:
            with lock.acquire(timeout=0):
                if yes:
                    shutil.rmtree(entry.directory)
        except Timeout:
            print(f"{entry.name}: kept, a process works on it")
            continue
        except OSError as error:
            raise UserError(
                f"cannot remove {entry.directory}: {error.strerror or error}"
            ) from error
        freed += entry.size
        print(f"{entry.name}: {'removed' if yes else 'would be removed'}, {why}")
    print(f"{_size(freed)} {'freed' if yes else 'to be freed: kdrun store gc --yes'}")
    return 0


def _work(entry: Entry) -> str:
    """Who is at an unfinished artefact."""
    lock = FileLock(entry.directory.with_name(f".{entry.directory.name}.lock"))
    try:
        with lock.acquire(timeout=0):
            return ", nobody works on it"
    except Timeout:
        return ", in work"


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


def _size(count: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
    return f"{count / 1024**power:.{min(power, 1)}f} {units[power]}"
