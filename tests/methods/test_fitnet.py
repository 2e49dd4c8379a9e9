from __future__ import annotations

import pytest
import torch
from torch import nn

from kdrun.layers.projectors import hint_regressor
from kdrun.methods.fitnet import FitNet
from kdrun.outputs import ModelOutput
from tests.methods.training import agreement, start, train


@pytest.mark.parametrize(
    ("size", "teacher_size", "kind", "kernel"),
    [
        (8, 4, nn.Conv2d, (3, 3)),
        (4, 8, nn.ConvTranspose2d, (4, 4)),
        (8, 8, nn.Conv2d, (1, 1)),
        (7, 5, nn.Conv2d, (3, 3)),
    ],
)
def test_regressor_reaches_the_teachers_shape(size, teacher_size, kind, kernel) -> None:
    student, teacher = torch.randn(2, 3, size, size), torch.randn(2, 5, teacher_size, teacher_size)
    regressor = hint_regressor(student.shape, teacher.shape)
    assert isinstance(regressor[0], kind)
    assert regressor[0].kernel_size == kernel
    assert regressor(student).shape == teacher.shape
    assert regressor(student).min() == 0


@pytest.mark.parametrize("shapes", [((2, 3, 4, 4), (2, 3, 7, 7)), ((2, 9, 3), (2, 3, 4, 4))])
def test_shapes_without_a_regressor_are_refused(shapes) -> None:
    with pytest.raises(ValueError, match=r"another stage|must be a map"):
        hint_regressor(*map(torch.Size, shapes))


def test_the_chosen_stage_is_tapped(data, teacher, student) -> None:
    session = start(FitNet(stage=3), student, teacher, data)
    assert session.method.regressor[0].in_channels == 16
    assert session.method.regressor[0].out_channels == 48


def test_training_predicts_the_hint(data, teacher, student) -> None:
    method = FitNet()
    history = train(method, student, teacher, data, epochs=3)
    assert history[-1]["hint"] < 0.6 * history[0]["hint"]
    assert agreement(student, teacher, data.inputs) > 0.8


def test_perfect_prediction_costs_nothing() -> None:
    method = FitNet()
    method.regressor = nn.Identity()
    features = {"stage2": torch.randn(2, 3, 4, 4)}
    output = ModelOutput(torch.zeros(2, 3), features)
    method.supervised_loss = lambda output, batch: torch.tensor(0.0)
    terms = method.losses(output, {"teacher": output}, batch=None, progress=None)
    assert terms["hint"] == 0
