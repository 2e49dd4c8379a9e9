from __future__ import annotations

import math

import pytest

from kdrun import pruning
from kdrun.pruning import Pruned, judged_by


def test_the_judge_is_told_within_the_block_only() -> None:
    told: list[tuple[str, int, float]] = []
    pruning.tell("distil", 1, 0.5)
    with judged_by(lambda *facts: told.append(facts)):
        pruning.tell("distil", 2, 0.6)
        pruning.tell("teacher", 1, math.inf)
    pruning.tell("distil", 3, 0.7)
    assert told == [("distil", 2, 0.6), ("teacher", 1, math.inf)]


def test_blocks_are_nested_and_end_with_an_error() -> None:
    def strict(stage: str, epoch: int, value: float) -> None:
        raise Pruned(epoch)

    with judged_by(lambda *facts: None):
        with pytest.raises(Pruned, match="given up after epoch 4"), judged_by(strict):
            pruning.tell("distil", 4, 0.1)
        pruning.tell("distil", 5, 0.1)
