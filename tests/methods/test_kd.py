from __future__ import annotations

import copy

import pytest
import torch

from kdrun.methods.kd import KD
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, train

NOW = Progress(0, 1, 0, 1)


def test_objective_by_hand() -> None:
    method = KD(temperature=2.0)
    batch = Batch(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([0]))
    student = ModelOutput(torch.tensor([[0.0, 0.0]]))
    teachers = {"teacher": ModelOutput(torch.tensor([[2.0, 0.0]]))}
    terms = method.losses(student, teachers, batch, NOW)
    assert terms["kd"].item() == pytest.approx(0.44378, abs=1e-5)
    assert terms["supervised"].item() == pytest.approx(0.693147, abs=1e-6)
    assert method.weights(NOW) == {"supervised": 0.1, "kd": 0.9}


def test_the_tasks_own_loss_is_the_supervised_term() -> None:
    method = KD()
    method.supervised_loss = lambda output, batch: torch.tensor(7.0)
    batch = Batch(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([0]))
    output = ModelOutput(torch.zeros(1, 2))
    assert method.losses(output, {"teacher": output}, batch, NOW)["supervised"] == 7


def test_training_brings_the_student_to_the_teacher(data, teacher, student) -> None:
    before = agreement(copy.deepcopy(student), teacher, data.inputs)
    history = train(KD(), student, teacher, data, epochs=3)
    assert history[-1]["kd"] < 0.3 * history[0]["kd"]
    assert agreement(student, teacher, data.inputs) > max(0.9, before)
