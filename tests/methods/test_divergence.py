from __future__ import annotations

import pytest
import torch

from kdrun.methods.divergence import Divergence
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, train

NOW = Progress(0, 1, 0, 1)
STUDENT = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
TEACHER = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])


def terms(method: Divergence, student=STUDENT, teacher=TEACHER, mask=None):
    batch = Batch(student, torch.zeros(student.shape[:-1]).long(), torch.arange(2), mask)
    return method.losses(ModelOutput(student), {"teacher": ModelOutput(teacher)}, batch, NOW)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"divergence": "forward_kl"}, 0.219552),
        ({"divergence": "reverse_kl"}, 0.189798),
        ({"divergence": "symmetric_kl", "share": 0.9}, 0.1 * 0.219552 + 0.9 * 0.189798),
        ({"divergence": "jsd", "beta": 0.1}, 0.019070),
        ({"divergence": "tvd"}, 0.251444),
        ({"divergence": "skew_forward_kl"}, 0.166246),
        ({"divergence": "skew_reverse_kl"}, 0.154005),
        ({"divergence": "adaptive_kl"}, 0.205126),
        ({"divergence": "alpha_beta"}, 0.219159),
    ],
)
def test_every_choice_by_hand(options: dict, expected: float) -> None:
    found = terms(Divergence(**options))
    assert set(found) == {"divergence"}
    assert found["divergence"].item() == pytest.approx(expected, abs=1e-6)


def test_temperature_softens_and_t_squared_is_in_the_weight() -> None:
    method = Divergence(temperature=2.0, t_squared=True, supervised_weight=0.5)
    expected = terms(Divergence(), STUDENT / 2, TEACHER / 2)["divergence"]
    torch.testing.assert_close(terms(method)["divergence"], expected)
    assert method.weights(NOW) == {"divergence": 4.0, "supervised": 0.5}


def test_a_sequence_is_judged_where_it_counts() -> None:
    mask = torch.tensor([[True, False]])
    student = STUDENT.unsqueeze(0).clone().requires_grad_()
    loss = terms(Divergence(), student, TEACHER.unsqueeze(0), mask)["divergence"]
    loss.backward()
    assert loss.item() == pytest.approx(0.061554, abs=1e-6)
    assert student.grad[0, 1].abs().max() == 0
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    student.grad = None
    empty = terms(Divergence(), student, TEACHER.unsqueeze(0), nothing)["divergence"]
    empty.backward()
    assert empty.item() == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "adaptive_kl"])
def test_training_brings_the_student_to_the_teacher(data, teacher, student, name: str) -> None:
    history = train(Divergence(divergence=name), student, teacher, data, epochs=10)
    assert history[-1]["divergence"] < 0.5 * history[0]["divergence"]
    assert agreement(student, teacher, data.inputs) > 0.85
