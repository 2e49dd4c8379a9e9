from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kdrun.losses.feature_maps import negative_margin, partial_squared_error
from kdrun.methods.ofd import OFD, connector
from kdrun.models.mobilenet_v2 import MobileNetV2
from kdrun.outputs import ModelOutput, Progress
from tests.methods.training import ConvNet, agreement, start, train


def test_margin_is_the_mean_of_the_negative_part() -> None:
    # Of a standard normal: -sqrt(2 / pi).
    margin = negative_margin(
        torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    )
    assert margin.item() == pytest.approx(-math.sqrt(2 / math.pi))
    weight, bias = torch.tensor([-0.7, 2.0]), torch.tensor([0.5, -1.0])
    generator = torch.Generator().manual_seed(0)
    draws = bias + weight * torch.randn(1_000_000, 2, generator=generator)
    expected = torch.stack([draws[draws[:, c] < 0, c].mean() for c in (0, 1)])
    torch.testing.assert_close(negative_margin(weight, bias), expected, atol=5e-3, rtol=0)


def test_margin_of_a_channel_that_is_hardly_ever_negative() -> None:
    margin = negative_margin(torch.tensor([-0.5, 0.0]), torch.tensor([5.0, 5.0]))
    assert margin.tolist() == pytest.approx([-1.5, 0.0])


def test_error_by_cases() -> None:
    cases = [
        # student, teacher, margin, asked
        (-0.2, -3.0, -1.0, (-0.2 + 1.0) ** 2),  # teacher below the margin, student above it
        (-2.0, -3.0, -1.0, 0.0),  # both below the margin
        (0.5, -0.4, -1.0, (0.5 + 0.4) ** 2),  # teacher between margin and zero, student above it
        (-0.6, -0.4, -1.0, 0.0),  # and student below it
        (-0.6, 0.7, -1.0, (0.6 + 0.7) ** 2),  # teacher fires
        (1.0, 0.7, -1.0, (1.0 - 0.7) ** 2),
    ]
    for student, teacher, margin, expected in cases:
        s, t = (torch.full((1, 1, 1, 1), value) for value in (student, teacher))
        error = partial_squared_error(s, t, torch.tensor([margin]))
        assert error.item() == pytest.approx(expected), (student, teacher)


def test_error_is_a_sum_over_the_map_and_a_mean_over_samples() -> None:
    student, teacher = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert partial_squared_error(student, teacher, torch.zeros(3)).item() == 3 * 16


def test_deeper_stages_count_twice_as_much() -> None:
    method = OFD()
    method.connectors = nn.ModuleList([nn.Identity() for _ in range(3)])
    for number in range(3):
        method.register_buffer(f"margin{number}", torch.zeros(1))
    shapes = [(1, 1, 4, 4), (1, 1, 2, 2), (1, 1, 1, 1)]
    names = [f"stage{number}.preactivation" for number in (1, 2, 3)]
    student = ModelOutput(
        torch.zeros(1, 2), dict(zip(names, map(torch.zeros, shapes), strict=True))
    )
    teacher = ModelOutput(torch.zeros(1, 2), dict(zip(names, map(torch.ones, shapes), strict=True)))
    method.supervised_loss = lambda output, batch: torch.zeros(())
    terms = method.losses(student, {"teacher": teacher}, None, Progress(0, 1, 0, 1))
    assert terms["overhaul"].item() == 16 / 4 + 4 / 2 + 1


def test_margins_come_from_the_teachers_batch_norms(data, teacher, student) -> None:
    method = start(OFD(), student, teacher, data).method
    for number, stage in enumerate((teacher.stage1, teacher.stage2, teacher.stage3)):
        expected = negative_margin(stage[1].weight, stage[1].bias)
        torch.testing.assert_close(method.get_buffer(f"margin{number}"), expected)
        assert (expected < 0).all()


def test_a_teacher_without_batch_norm_is_refused(data, student) -> None:
    teacher = ConvNet(width=4)
    teacher.stage2[1] = nn.Identity()
    with pytest.raises(ValueError, match="stage2 of the teacher"):
        start(OFD(), student, teacher, data)


def test_connector_starts_with_the_variance_of_its_outputs() -> None:
    torch.manual_seed(0)
    assert connector(256, 128)[0].weight.std().item() == pytest.approx(1 / 8, rel=0.02)


def test_training_matches_the_preactivations(data, teacher, student) -> None:
    history = train(OFD(), student, teacher, data, epochs=3)
    assert history[-1]["overhaul"] < 0.6 * history[0]["overhaul"]
    assert agreement(student, teacher, data.inputs) > 0.8


def test_a_student_of_linear_bottlenecks(data, teacher) -> None:
    """MobileNetV2, whose stages no ReLU follows: they are compared as they are."""
    torch.manual_seed(0)
    student = MobileNetV2(num_classes=10, in_channels=1, width=0.25)
    session = start(OFD(), student, teacher, data.rows(slice(16)))
    terms = session.terms(data.rows(slice(16)), Progress(0, 1, 0, 1))
    terms["overhaul"].backward()
    for connect in session.method.connectors:
        assert connect[0].weight.grad.abs().max() > 0
    gradient = student.blocks[6][-1].conv[6].weight.grad
    assert gradient.abs().max() > 0


def test_linear_bottlenecks_do_not_teach(data, student) -> None:
    teacher = MobileNetV2(num_classes=10, in_channels=1, width=0.25)
    with pytest.raises(ValueError, match=r"stage1 of the teacher \(MobileNetV2\) has none"):
        start(OFD(), student, teacher, data.rows(slice(16)))
