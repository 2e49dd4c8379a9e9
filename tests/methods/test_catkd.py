from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdrun.methods.catkd import CATKD, class_attention_distance
from tests.methods.training import agreement, start, train


def test_logits_are_the_average_of_the_maps(data, teacher, student) -> None:
    weight = student.classifier.weight.detach().clone()
    session = start(CATKD(), student, teacher, data)
    student.eval()
    output, _ = session.forward(data.rows(slice(8)))
    (cam,) = output.features.values()
    assert cam.shape == (8, 10, 2, 2)
    torch.testing.assert_close(output.logits, cam.mean(dim=(2, 3)))
    # The convolution starts as the classifier that it replaces, without the bias.
    convolution = student.stage3[1]
    torch.testing.assert_close(convolution.weight[:, :, 0, 0], weight)
    assert isinstance(student.classifier, nn.Identity)
    assert convolution.bias is None


def test_the_teachers_maps_average_to_its_logits_without_the_bias(data, teacher, student) -> None:
    session = start(CATKD(), student, teacher, data)
    _, others = session.forward(data.rows(slice(8)))
    (features,) = others["teacher"].features.values()
    cam = F.conv2d(features, session.method.teacher_classifier)
    torch.testing.assert_close(
        cam.mean(dim=(2, 3)) + teacher.classifier.bias, others["teacher"].logits
    )
    assert not list(session.method.parameters())


def test_distance_is_that_of_pooled_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, 4, 4, generator=generator)
    teacher = torch.randn(3, 5, 8, 8, generator=generator)
    pooled = F.avg_pool2d(student, 2), F.avg_pool2d(teacher, 4)
    torch.testing.assert_close(
        class_attention_distance(student, teacher, resolution=2, normalize=False),
        ((pooled[0] - pooled[1]) ** 2).mean(),
    )
    scaled = [p / p.square().sum(dim=(2, 3), keepdim=True).sqrt() for p in pooled]
    torch.testing.assert_close(
        class_attention_distance(3 * student, teacher, resolution=2, normalize=True),
        ((scaled[0] - scaled[1]) ** 2).mean(),
    )


def test_training_matches_the_class_attention(data, teacher, student) -> None:
    # The default weight is made for a hundred classes and larger maps.
    history = train(CATKD(weight=0.2), student, teacher, data, epochs=3)
    assert history[-1]["attention"] < 0.5 * history[0]["attention"]
    assert agreement(student, teacher, data.inputs) > 0.9
