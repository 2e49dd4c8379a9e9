"""Text as rows of tokens for language models: any source of documents, any tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from kdrun.data.batches import Preprocessing
from kdrun.data.documents import Document, Source
from kdrun.data.module import DataModule
from kdrun.data.tokenizers import Tokenizer, open_tokenizer
from kdrun.data.tokens import TokenRows
from kdrun.errors import UserError
from kdrun.parameters import PositiveInt, ProperFraction

PARTS = ("train", "validation", "test")

Encoded = tuple[Tensor, int]
"""The ids of a document, and how many of its first ones are spared."""


class Text(DataModule):
    """Documents, tokenised and cut into rows of equal length.

    Packed, documents follow each other with an end token between them, and rows are cut from that
    stream wherever they fall; attention crosses the ends, as in GPT-2. Otherwise a row is one
    document, filled up with end tokens that do not count.

    Splits that the source does not bring are contiguous: the first rows train, those before the
    last validate, the last test.

    Args:
        source: of the documents (``kdrun.data.documents``).
        tokenizer: ``byte``, ``bpe`` (learned from the training text), or a model's name on the hub
            or folder.
        vocabulary: tokens that ``bpe`` learns; other tokenizers have their own number.
        length: predictions in a row.
        packed: one stream of all documents, or a row for each.
        too_long: of unpacked documents: cut them at the end, or leave them out.
        counted: which predictions count: all, or those of the response alone.
        train_rows: rows of the training split that are used; null: all.
        val_fraction: share of the training rows held out for validation where there is no split.
        test_fraction: share held out for the test where there is none.
    """

    task = "language_modelling"
    reads_classes = True

    def __init__(
        self,
        *,
        source: Source,
        tokenizer: str = "byte",
        vocabulary: PositiveInt = 1024,
        length: PositiveInt = 128,
        packed: bool = True,
        too_long: Literal["cut", "drop"] = "cut",
        counted: Literal["all", "response"] = "all",
        train_rows: PositiveInt | None = None,
        val_fraction: ProperFraction = 0.1,
        test_fraction: ProperFraction = 0.1,
    ) -> None:
        super().__init__(val_fraction=val_fraction, preprocessing=Preprocessing())
        self.source, self.tokenizer_name, self.vocabulary = source, tokenizer, vocabulary
        self.length, self.packed, self.too_long = length, packed, too_long
        self.counted, self.train_rows, self.test_fraction = counted, train_rows, test_fraction
        self.tokenizer: Tokenizer | None = None

    def evaluation_batch_size(self, training: int) -> int:
        """As many rows as in training: their logits are what takes memory."""
        return training

    def load(self) -> dict[str, TokenRows]:
        """All three splits."""
        documents = self.source.load()
        texts = (text for document in documents["train"] for text in document)
        self.tokenizer = open_tokenizer(self.tokenizer_name, self.vocabulary, texts)
        self.class_names = list(self.tokenizer.names)
        encoded = {part: self._encoded(documents[part]) for part in PARTS if part in documents}
        make = packed_rows if self.packed else padded_rows
        drop = self.too_long == "drop"
        rows = {
            part: make(made, self.length + 1, end=self.tokenizer.end, drop=drop)
            for part, made in encoded.items()
        }
        self._check(rows)
        every = chain.from_iterable(documents[part] for part in encoded)
        size = sum(len(text.encode()) for document in every for text in document)
        tokens = sum(len(ids) for ids, _ in chain.from_iterable(encoded.values()))
        self.task_arguments = {"bytes_per_token": size / tokens}
        for part, fraction in (("test", self.test_fraction), ("validation", self.val_fraction)):
            if part not in rows:
                held_out = round(fraction * len(rows["train"]))
                rows["train"], rows[part] = _cut(rows["train"], held_out)
        if self.train_rows is not None:
            rows["train"] = rows["train"].take(torch.arange(len(rows["train"]))[: self.train_rows])
        return rows

    def _encoded(self, documents: Iterable[Document]) -> list[Encoded]:
        encoded = []
        for prompt, response in documents:
            before = self.tokenizer.encode(prompt) if prompt else []
            ids = [*before, *self.tokenizer.encode(response), self.tokenizer.end]
            spared = len(before) if self.counted == "response" else 0
            encoded.append((torch.tensor(ids, dtype=torch.int32), spared))
        return encoded

    def _check(self, rows: Mapping[str, TokenRows]) -> None:
        for part, made in rows.items():
            if not len(made):
                why = "is shorter than a row" if self.packed else "has no document"
                raise UserError(f"the {part} text {why} of dataset.length={self.length} tokens")
            largest = int(made.tokens.max())
            if largest >= len(self.class_names):
                raise UserError(
                    f"dataset.tokenizer={self.tokenizer_name} gives the token {largest}, but its "
                    f"vocabulary has {len(self.class_names)}"
                )
            if made.counted is not None and not bool(made.counted[:, 1:].any()):
                raise UserError(
                    f"no token of the {part} text counts within dataset.length={self.length}"
                )


def packed_rows(documents: Sequence[Encoded], size: int, *, end: int, drop: bool) -> TokenRows:
    """One stream of documents cut into rows of ``size`` tokens; what is left at the end is lost.

    Consecutive rows share a token: the last of one, predicted there, is the first of the next.

    Args:
        documents: each with the token that ends it.
        size: L + 1.
        end: the token that ends a document.
        drop: leave out documents longer than a row.
    """
    kept = [document for document in documents if not (drop and len(document[0]) > size)]
    stream = torch.cat([ids for ids, _ in kept] or [torch.empty(0, dtype=torch.int32)])
    number = max(0, (len(stream) - 1) // (size - 1))
    if not number:
        return TokenRows(torch.empty(0, size, dtype=torch.int32), torch.empty(0).long())
    counted = None
    if any(spared for _, spared in kept):
        counts = torch.cat([torch.arange(len(ids)) >= spared for ids, spared in kept])
        counted = counts.unfold(0, size, size - 1)[:number].contiguous()
    rows = stream.unfold(0, size, size - 1)[:number].contiguous()
    return TokenRows(rows, torch.arange(number), counted)


def padded_rows(documents: Sequence[Encoded], size: int, *, end: int, drop: bool) -> TokenRows:
    """A row for each document, cut to ``size`` tokens or filled up with ``end``, which then does
    not count. A row without a prediction that counts has nothing to teach, and is left out.

    Args:
        documents: each with the token that ends it.
        size: L + 1.
        end: what rows are filled up with.
        drop: leave out documents that are too long, instead of cutting them.
    """
    kept = [document for document in documents if not (drop and len(document[0]) > size)]
    tokens = torch.full((len(kept), size), end, dtype=torch.int32)
    counted = torch.zeros(len(kept), size, dtype=torch.bool)
    for row, (ids, spared) in enumerate(kept):
        stop = min(len(ids), size)
        tokens[row, :stop] = ids[:stop]
        counted[row, spared:stop] = True
    lengths = torch.tensor([min(len(ids), size) for ids, _ in kept], dtype=torch.int64)
    useful = counted[:, 1:].any(dim=1).nonzero().flatten()
    return TokenRows(tokens, torch.arange(len(kept)), counted, lengths).take(useful)


def _cut(rows: TokenRows, held_out: int) -> tuple[TokenRows, TokenRows]:
    numbers, stop = torch.arange(len(rows)), len(rows) - held_out
    return rows.take(numbers[:stop]), rows.take(numbers[stop:])
