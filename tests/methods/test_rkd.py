from __future__ import annotations

from kdrun.methods.rkd import RKD
from tests.methods.training import agreement, train


def test_training_transfers_the_relations(data, teacher, student) -> None:
    history = train(RKD(), student, teacher, data, epochs=3)
    assert history[-1]["distance"] < 0.7 * history[0]["distance"]
    assert history[-1]["angle"] < 0.7 * history[0]["angle"]
    assert agreement(student, teacher, data.inputs) > 0.8
