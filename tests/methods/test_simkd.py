from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdrun.methods.simkd import SimKD
from tests.methods.training import ConvNet, agreement, start, train


def test_the_student_predicts_with_the_teachers_classifier(data, teacher, student) -> None:
    session = start(SimKD(), student, teacher, data)
    batch = data.rows(slice(8))
    student.eval()
    output, _ = session.forward(batch)
    (projected,) = output.features.values()
    assert projected.shape == (8, 48, 2, 2)
    expected = F.linear(
        projected.mean(dim=(2, 3)), teacher.classifier.weight, teacher.classifier.bias
    )
    torch.testing.assert_close(output.logits, expected)


def test_only_trunk_and_projector_are_trained(data, teacher, student) -> None:
    session = start(SimKD(reduction=4), student, teacher, data)
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["classifier.weight", "classifier.bias"]
    convolutions = [m for m in student.stage3[1] if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        (16, 12, 1),
        (12, 12, 3),
        (12, 48, 1),
    ]
    assert not list(session.method.parameters())


@pytest.mark.parametrize(("student_stride", "teacher_stride"), [(1, 2), (2, 1)])
def test_the_larger_map_is_pooled(data, student_stride, teacher_stride) -> None:
    student, teacher = ConvNet(width=4), ConvNet(width=4)
    student.stage3[0].stride = (student_stride, student_stride)
    teacher.stage3[0].stride = (teacher_stride, teacher_stride)
    session = start(SimKD(), student, teacher, data.rows(slice(8)))
    output, others = session.forward(data.rows(slice(8)))
    (projected,) = output.features.values()
    assert projected.shape == (8, 16, 2, 2)
    loss = session.method.losses(output, others, None, None)["feature"]
    (target,) = others["teacher"].features.values()
    expected = F.mse_loss(projected, F.adaptive_avg_pool2d(target, 2))
    torch.testing.assert_close(loss, expected)


def test_a_teacher_whose_classifier_averages_no_map_is_refused(data, student) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    with pytest.raises(ValueError, match="spatial average"):
        start(SimKD(), student, teacher, data)


def test_a_copy_of_the_deployed_student_stands_alone(data, teacher, student) -> None:
    session = start(SimKD(), student, teacher, data)
    deployed = copy.deepcopy(session.method.deploy(student)).eval()
    expected = deployed(data.inputs[:4])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    torch.testing.assert_close(deployed(data.inputs[:4]), expected)


def test_training_without_labels_teaches_the_classes(data, teacher, student) -> None:
    history = train(SimKD(), student, teacher, data, epochs=4)
    assert set(history[0]) == {"feature"}
    assert history[-1]["feature"] < 0.5 * history[0]["feature"]
    assert agreement(student, teacher, data.inputs) > 0.8
