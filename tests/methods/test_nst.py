from __future__ import annotations

from kdrun.methods.nst import NST
from tests.methods.training import agreement, train


def test_training_transfers_the_selectivity(data, teacher, student) -> None:
    # The default weight is made for maps with many more positions than these.
    history = train(NST(weight=5.0), student, teacher, data, epochs=3)
    assert history[-1]["selectivity"] < 0.7 * history[0]["selectivity"]
    assert agreement(student, teacher, data.inputs) > 0.8
