from __future__ import annotations

from kdrun.methods.sp import SP
from tests.methods.training import agreement, train


def test_training_transfers_the_similarities(data, teacher, student) -> None:
    history = train(SP(), student, teacher, data, epochs=3)
    assert history[-1]["similarity"] < 0.7 * history[0]["similarity"]
    assert agreement(student, teacher, data.inputs) > 0.8
