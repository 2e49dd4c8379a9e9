from __future__ import annotations

from kdrun.methods.cc import CC
from tests.methods.training import agreement, start, train


def test_embeddings_have_the_widths_of_both(data, teacher, student) -> None:
    method = start(CC(dimension=32), student, teacher, data).method
    assert method.student_embedding.weight.shape == (32, 16)
    assert method.teacher_embedding.weight.shape == (32, 48)


def test_training_makes_neighbours_congruent(data, teacher, student) -> None:
    history = train(CC(), student, teacher, data, epochs=3)
    assert history[-1]["congruence"] < 0.5 * history[0]["congruence"]
    assert agreement(student, teacher, data.inputs) > 0.8
