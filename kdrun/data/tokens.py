"""Rows of token ids on the device of the networks, and their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrun.data.batches import Preprocessing
from kdrun.data.loader import LoaderOptions
from kdrun.outputs import Batch, next_token_batch


@dataclass(slots=True)
class TokenRows:
    """The sequences of one split.

    Attributes:
        tokens: ``(N, L + 1)`` int32; a row gives L predictions.
        index: ``(N,)`` int64, the stable number of each row in its split.
        counted: ``(N, L + 1)`` bool, tokens whose prediction counts; None: all of them.
        lengths: ``(N,)`` tokens of each row before it is filled up; None: all are full.
        content: hash of all of it; computed when it is not given.
    """

    tokens: Tensor
    index: Tensor
    counted: Tensor | None = None
    lengths: Tensor | None = None
    content: str = ""
    _copies: dict[torch.device, TokenRows] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.content:
            digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
            for part in (self.tokens, self.counted, self.lengths):
                if part is not None:
                    digest.update(part.contiguous().numpy())
            self.content = digest.hexdigest()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Predictions of a full row: ``(L,)``."""
        return (self.tokens.shape[1] - 1,)

    @property
    def target(self) -> Tensor:
        """The rows themselves: every token is the target of those before it."""
        return self.tokens

    def take(self, rows: Tensor) -> TokenRows:
        """The given rows as a part of their own."""
        counted = None if self.counted is None else self.counted[rows]
        lengths = None if self.lengths is None else self.lengths[rows]
        return TokenRows(self.tokens[rows], self.index[rows], counted, lengths)

    def serve(self, options: LoaderOptions, preprocessing: Preprocessing) -> TokenLoader:
        """Batches of these rows; they are sent to a device once for all its loaders."""
        device = torch.device(options.device)
        if device not in self._copies:
            counted = None if self.counted is None else self.counted.to(device)
            # Lengths stay on the CPU: batches are cut to the longest row without asking the device.
            self._copies[device] = TokenRows(
                self.tokens.to(device),
                self.index.to(device),
                counted,
                self.lengths,
                self.content,
            )
        return TokenLoader(self._copies[device], options)


class TokenLoader:
    """Batches of rows that live on the device; see ``kdrun.data.loader.Loader``.

    A batch is as long as its longest row. Rows are filled up on the right, where a causal network
    does not look, so no attention mask is needed.

    Args:
        rows: on ``options.device``.
        options: batch size, seed, rank and so on; the type is that of token ids in any case.
    """

    def __init__(self, rows: TokenRows, options: LoaderOptions) -> None:
        self.rows, self.options = rows, options
        self._epoch, self._start = 0, 0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.options.batches(len(self.rows))

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and how many of its first batches to leave out."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        for position in range(self._start, len(self)):
            yield self.replay(epoch, position)

    def replay(self, epoch: int, position: int) -> Batch:
        """One batch of any epoch again, bit for bit."""
        if self._order[0] != epoch:
            self._order = (epoch, self.options.order(len(self.rows), epoch))
        first, last = self.options.bounds(len(self.rows), position)
        chosen = self._order[1][first:last]
        tokens, counted, lengths = self.rows.tokens, self.rows.counted, self.rows.lengths
        end = tokens.shape[1]
        if lengths is not None and len(chosen):
            end = int(lengths[chosen].max())
        chosen = chosen.to(tokens.device)
        if counted is not None:
            counted = counted[:, :end].index_select(0, chosen)
        return next_token_batch(
            tokens[:, :end].index_select(0, chosen).long(),
            counted,
            self.rows.index.index_select(0, chosen),
        )
