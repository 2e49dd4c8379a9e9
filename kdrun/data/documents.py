"""Where text comes from: a folder, the standard library's own source, or a set of the hub.

A source gives documents by split. A document is what was asked and what was answered; plain text is
all answer.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from kdrun.data.sources import data_folder
from kdrun.errors import UserError
from kdrun.parameters import PositiveInt


class Document(NamedTuple):
    """One text; ``prompt`` is context that a model may be spared to predict."""

    prompt: str
    response: str


class Source(Protocol):
    """Gives documents by split: ``train``, and ``validation`` and ``test`` where it has them."""

    def load(self) -> dict[str, list[Document]]:
        """All documents.

        Raises:
            UserError: there are none, or they cannot be read; names the place.
        """


class TextFolder:
    """Text files below a folder (or one file), in a fixed order drawn from their names.

    So a contiguous cut into splits mixes the folder's parts, and keeps a file in one of them.

    Args:
        path: folder or file; ``~`` and places below ``KDRUN_DATA`` are understood.
        pattern: which files, as in ``Path.rglob``.
        encoding: of the files.
    """

    def __init__(self, *, path: str, pattern: str = "*.txt", encoding: str = "utf-8") -> None:
        self.path, self.pattern, self.encoding = path, pattern, encoding

    def load(self) -> dict[str, list[Document]]:
        """The files as documents of one split."""
        given = Path(self.path).expanduser()
        is_place = given.exists() or self.path.startswith(("/", ".", "~"))
        root = given if is_place else data_folder(self.path)
        if root is None or not root.exists():
            raise UserError(f"dataset.source.path={self.path}: no such file or folder")
        files = [root] if root.is_file() else list(root.rglob(self.pattern))
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"{root} holds no text: no file matches {self.pattern}")
        try:
            texts = [file.read_text(encoding=self.encoding) for file in _drawn(files, root)]
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{root}: cannot be read as {self.encoding} text: {error}") from error
        return {"train": _plain(texts, str(root))}


class StandardLibrary:
    """Source code of the running Python's standard library: text that is always at hand.

    What it holds depends on the version of Python.

    Args:
        bytes_at_most: files are taken, in a fixed order drawn from their names, until they hold
            this much.
    """

    def __init__(self, *, bytes_at_most: PositiveInt = 1_000_000) -> None:
        self.bytes_at_most = bytes_at_most

    def load(self) -> dict[str, list[Document]]:
        """The modules as documents of one split."""
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3"}
        files = [
            file
            for file in root.rglob("*.py")
            if not skipped & set(file.relative_to(root).parts) and file.stat().st_size
        ]
        texts, size = [], 0
        for file in _drawn(files, root):
            text = file.read_text(encoding="utf-8", errors="replace")
            size += len(text.encode())
            if size > self.bytes_at_most:
                break
            texts.append(text)
        if not texts:
            raise UserError(f"dataset.source.bytes_at_most={self.bytes_at_most}: holds no file")
        return {"train": _plain(texts, str(root))}


class HubText:
    """Text of the hub, or of a local copy below ``KDRUN_DATA``.

    A folder that holds ``input.txt`` alone (``karpathy/tiny_shakespeare``) is read as one document.

    Args:
        name: of the set.
        configuration: of sets that have several.
        revision: commit or tag on the hub.
        template: a row as text, with columns in braces: ``{text}``.
        prompt: template of what comes before it, which need not be predicted; null: nothing.
        names: words for the values of class columns, by column: ``{label: [bad, good]}``.
        train_split: as the set calls it.
        validation_split: null: held out of train.
        test_split: null: held out of train.
        documents_at_most: of each split; null: all.
    """

    def __init__(
        self,
        *,
        name: str,
        configuration: str | None = None,
        revision: str | None = None,
        template: str = "{text}",
        prompt: str | None = None,
        names: dict | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        documents_at_most: PositiveInt | None = None,
    ) -> None:
        self.name, self.configuration, self.revision = name, configuration, revision
        self.template, self.prompt, self.names = template, prompt or "", dict(names or {})
        self.documents_at_most = documents_at_most
        splits = {"train": train_split, "validation": validation_split, "test": test_split}
        self.splits = {part: split for part, split in splits.items() if split is not None}

    def load(self) -> dict[str, list[Document]]:
        """The rows as documents."""
        folder = data_folder(self.name)
        if folder is not None and (folder / "input.txt").is_file():
            text = (folder / "input.txt").read_text(encoding="utf-8")
            return {"train": _plain([text], str(folder))}
        parts = _rows(self.name, self.splits, self.configuration, self.revision)
        return {
            part: [self._document(rows[number]) for number in _first(rows, self.documents_at_most)]
            for part, rows in parts.items()
        }

    def _document(self, row: dict[str, Any]) -> Document:
        for column, words in self.names.items():
            if column in row:
                row = row | {column: words[row[column]]}
        try:
            return Document(self.prompt.format_map(row), self.template.format_map(row))
        except KeyError as error:
            columns = ", ".join(row)
            raise UserError(f"{self.name} has no column {error}; it has {columns}") from error


class HubChats:
    """Conversations of the hub: lists of ``{role, content}``.

    A conversation is written turn by turn as ``<|role|>``, a line break, the content and ``</s>``;
    its prompt ends where the last turn of the assistant begins.

    Args:
        name: on the hub, or below ``KDRUN_DATA``.
        column: of the conversations.
        train_split: as the set calls it.
        test_split: null: held out of train.
        documents_at_most: of each split; null: all.
    """

    def __init__(
        self,
        *,
        name: str,
        column: str = "messages",
        train_split: str = "train",
        test_split: str | None = None,
        documents_at_most: PositiveInt | None = None,
    ) -> None:
        self.name, self.column, self.documents_at_most = name, column, documents_at_most
        self.splits = {"train": train_split} | ({"test": test_split} if test_split else {})

    def load(self) -> dict[str, list[Document]]:
        """Conversations that end with a turn of the assistant."""
        documents = {}
        for part, rows in _rows(self.name, self.splits).items():
            if self.column not in rows.column_names:
                columns = ", ".join(rows.column_names)
                raise UserError(f"{self.name} has no column {self.column!r}; it has {columns}")
            chats = (rows[number][self.column] for number in _first(rows, self.documents_at_most))
            documents[part] = [conversation(chat) for chat in chats if ends_well(chat)]
        return documents


def ends_well(turns: list[dict[str, str]]) -> bool:
    """Whether the assistant has the last word."""
    return bool(turns) and turns[-1]["role"] == "assistant"


def conversation(turns: list[dict[str, str]]) -> Document:
    """The turns as one text; the prompt ends with the assistant's last header."""
    written = [f"<|{turn['role']}|>\n{turn['content']}</s>\n" for turn in turns]
    header = "<|assistant|>\n"
    return Document("".join(written[:-1]) + header, written[-1].removeprefix(header))


def _rows(
    name: str,
    splits: Mapping[str, str],
    configuration: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """The wanted splits of a set below ``KDRUN_DATA`` or on the hub, as ``datasets`` reads them."""
    import datasets

    folder = data_folder(name)
    try:
        loaded = datasets.load_dataset(
            str(folder or name), configuration, revision=None if folder else revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        place = f"{folder} cannot be read" if folder else "not below KDRUN_DATA, and the hub says"
        raise UserError(f"dataset.source.name={name}: {place}: {reason}") from error
    for split in splits.values():
        if split not in loaded:
            raise UserError(f"{name} has no split {split!r}; it has {', '.join(loaded)}")
    return {part: loaded[split] for part, split in splits.items()}


def _first(rows: Any, count: int | None) -> range:
    return range(len(rows) if count is None else min(count, len(rows)))


def _drawn(files: Iterable[Path], root: Path) -> list[Path]:
    """The files in an order that looks random, and is the same wherever the folder lies."""

    def draw(file: Path) -> str:
        place = file.relative_to(root) if root.is_dir() else file.name
        return hashlib.sha256(str(place).encode()).hexdigest()

    return sorted(files, key=draw)


def _plain(texts: Iterable[str], place: str) -> list[Document]:
    documents = [Document("", text) for text in texts if text.strip()]
    if not documents:
        raise UserError(f"{place} holds no text: every file is empty")
    return documents
