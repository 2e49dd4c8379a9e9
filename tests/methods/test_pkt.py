from __future__ import annotations

from kdrun.methods.pkt import PKT
from tests.methods.training import agreement, train


def test_training_transfers_the_neighbours(data, teacher, student) -> None:
    history = train(PKT(), student, teacher, data, epochs=3)
    assert history[-1]["neighbours"] < 0.7 * history[0]["neighbours"]
    assert agreement(student, teacher, data.inputs) > 0.8
