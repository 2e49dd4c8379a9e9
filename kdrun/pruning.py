"""Giving up on a run before its end: who judges it is told of each epoch and may say so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Judge = Callable[[str, int, float], None]
"""Told stage, epoch (from 1) and validation result; raises ``Pruned`` to end the run."""


class Pruned(Exception):
    """The run is not worth finishing; its directory keeps the checkpoint of its last epoch.

    Attributes:
        epoch: after which it was given up.
    """

    def __init__(self, epoch: int) -> None:
        super().__init__(f"given up after epoch {epoch}")
        self.epoch = epoch


_judge: ContextVar[Judge | None] = ContextVar("judge", default=None)


@contextlib.contextmanager
def judged_by(judge: Judge) -> Iterator[None]:
    """Within the block, trainings of this process are judged."""
    token = _judge.set(judge)
    try:
        yield
    finally:
        _judge.reset(token)


def tell(stage: str, epoch: int, value: float) -> None:
    """Tell the judge, where there is one, how an epoch went.

    Raises:
        Pruned: the run is to end.
    """
    judge = _judge.get()
    if judge is not None:
        judge(stage, epoch, value)
