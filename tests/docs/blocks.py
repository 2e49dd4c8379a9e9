"""Fenced blocks of the documents, and how each is tested.

A block is a command block where its fence says ``console`` (commands start with ``$ ``, the rest is
their output) or ``bash`` (every line is a command). By default the commands are run as they stand.
An HTML comment on the line before the fence, out of a reader's sight, says otherwise:

``<!-- test: add training=smoke -->``
    The words are added to every run in the block, in place of words with the same key: the
    documented command, made short.
``<!-- test: fails -->``
    The commands end with exit status 2.
``<!-- test: compose -->``
    The commands need a cluster, a GPU or data that is not at hand: only their config is composed
    and checked.
``<!-- test: skip REASON -->``
    Not run at all.
``<!-- file: PATH -->``
    The block is a file, present beside all command blocks of its document.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<directive>(?:test|file): [^\n]*?) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Command:
    """One command of a block and the output that the document shows for it."""

    text: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        """What follows ``kdrun``; empty for other programs."""
        words = shlex.split(self.text, comments=True)
        names = ("kdrun", "scripts/run")
        start = next((i + 1 for i, word in enumerate(words) if word in names), len(words))
        return words[start:]

    @property
    def is_run(self) -> bool:
        """Whether it trains: ``kdrun`` with overrides instead of a verb."""
        words = self.words
        while words[:1] == ["--config-dir"]:
            words = words[2:]
        return bool(words) and ("=" in words[0] or words[0] == "-m")

    @property
    def trains(self) -> bool:
        """Whether networks are trained: by a run, or by all runs of a table."""
        table = "table" in self.words and "--dry-run" not in self.words
        return self.is_run or (table and self.words[-1] != "table")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: the file it stands in.
        line: number of its fence.
        language: what the fence says.
        text: what is inside.
        kind: ``add``, ``fails``, ``compose``, ``skip`` or ``file``; empty: as it stands.
        argument: what follows the kind.
    """

    document: Path
    line: int
    language: str
    text: str
    kind: str = ""
    argument: str = ""

    @property
    def commands(self) -> list[Command]:
        """The commands of a command block, lines ending in a backslash joined."""
        if self.language == "bash":
            lines = self.text.replace("\\\n", " ").splitlines()
            return [Command(line) for line in lines if line.strip() and not line.startswith("#")]
        if self.language != "console":
            return []
        parts = re.split(r"^\$ ", self.text.replace("\\\n", " "), flags=re.MULTILINE)
        assert not parts[0].strip(), f"{self.document.name}:{self.line}: output before a command"
        pairs = [part.partition("\n") for part in parts[1:]]
        return [Command(command, output) for command, _, output in pairs]

    @property
    def trains(self) -> bool:
        """Whether testing the block trains networks, which takes more than a few seconds."""
        return self.kind in ("", "add") and any(command.trains for command in self.commands)

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path) -> Iterator[Block]:
    """The fenced blocks of a Markdown file."""
    text = document.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        kind = argument = ""
        if found["directive"]:
            topic, _, rest = found["directive"].partition(": ")
            kind, _, argument = (
                ("file", "", rest) if topic == "file" else rest.strip().partition(" ")
            )
        assert kind in ("", "add", "fails", "compose", "skip", "file"), f"{document}:{line}: {kind}"
        yield Block(document, line, found["language"], found["text"], kind, argument.strip())


def shortened(command: Command, words: str) -> str:
    """A run or table with further words, in place of those with the same key; others unchanged."""
    if not command.trains:
        return command.text
    added = shlex.split(words)
    keys = {word.partition("=")[0] for word in added}
    # Quoted words that are not touched keep their quotes.
    kept = [word for word in command.text.split() if word.partition("=")[0] not in keys]
    return " ".join([*kept, *map(shlex.quote, added)])
