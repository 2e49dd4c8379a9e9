from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdrun.losses.feature_maps import hierarchical_context_loss
from kdrun.methods.reviewkd import AttentionFusion, ReviewKD
from kdrun.models.mobilenet_v2 import MobileNetV2
from kdrun.outputs import ModelOutput, Progress
from tests.methods.training import ConvNet, agreement, start, train


def maps(*shapes: tuple[int, int, int], suffix: str = "") -> ModelOutput:
    generator = torch.Generator().manual_seed(0)
    features = {
        f"stage{number}{suffix}": torch.randn(2, *shape, generator=generator)
        for number, shape in enumerate(shapes[:-1], start=1)
    }
    return ModelOutput(torch.zeros(2, 3), features | {"penultimate": torch.randn(2, shapes[-1][0])})


def test_context_loss_weighs_the_resolutions_that_exist() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 8, 8, generator=generator).unbind()
    for size, weights in [
        (8, {8: 1, 4: 1 / 2, 2: 1 / 4, 1: 1 / 8}),
        (4, {4: 1, 2: 1 / 2, 1: 1 / 4}),
        (1, {1: 1}),
    ]:
        s, t = student[..., :size, :size], teacher[..., :size, :size]
        expected = sum(
            weight * F.mse_loss(F.adaptive_avg_pool2d(s, cells), F.adaptive_avg_pool2d(t, cells))
            for cells, weight in weights.items()
        ) / sum(weights.values())
        torch.testing.assert_close(hierarchical_context_loss(s, t), expected)


def test_fusion_adds_what_is_passed_on_by_attention() -> None:
    torch.manual_seed(0)
    fusion = AttentionFusion(3, 4, 5, deepest=False).eval()
    features, passed_on = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    predicted, fused = fusion(features, passed_on, torch.Size((8, 8)))
    own = fusion.reduce(features)
    other = passed_on.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    weights = torch.sigmoid(fusion.attention[0](torch.cat([own, other], 1)))
    torch.testing.assert_close(fused, weights[:, :1] * own + weights[:, 1:] * other)
    torch.testing.assert_close(predicted, fusion.expand(fused))


def test_fusion_takes_the_teachers_size() -> None:
    fusion = AttentionFusion(3, 4, 5, deepest=True)
    predicted, fused = fusion(torch.randn(2, 3, 4, 4), None, torch.Size((8, 8)))
    assert predicted.shape == (2, 5, 8, 8)
    assert fused.shape == (2, 4, 8, 8)


def test_levels_and_widths_are_those_of_the_paper() -> None:
    # resnet32x4 -> resnet8x4: inputs [64, 128, 256, 256] and as many outputs, 256 between.
    shapes = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (256, 1, 1)]
    method = ReviewKD()
    method.setup(maps(*shapes), {"teacher": maps(*shapes, suffix=".preactivation")})
    assert [f.reduce[0].in_channels for f in method.fusions] == [256, 256, 128, 64]
    assert {f.reduce[0].out_channels for f in method.fusions} == {256}
    assert [f.expand[0].out_channels for f in method.fusions] == [256, 256, 128, 64]
    assert [f.attention is None for f in method.fusions] == [True, False, False, False]
    # mobilenet_v2 from resnet50: at most 512 between.
    student = maps((12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2), (1280, 1, 1))
    teacher = maps(
        (256, 32, 32),
        (512, 16, 16),
        (1024, 8, 8),
        (2048, 4, 4),
        (2048, 1, 1),
        suffix=".preactivation",
    )
    method = ReviewKD()
    method.setup(student, {"teacher": teacher})
    assert {f.reduce[0].out_channels for f in method.fusions} == {512}
    method.supervised_loss = lambda output, batch: torch.zeros(())
    terms = method.losses(student, {"teacher": teacher}, None, Progress(0, 1, 0, 1))
    assert torch.isfinite(terms["review"])


def test_weight_rises_over_the_warm_up_counted_from_one() -> None:
    method = ReviewKD(weight=5.0, warmup_epochs=20)
    factors = [method.weights(Progress(e, 240, 0, 1))["review"] for e in (0, 9, 19, 100)]
    assert factors == [0.25, 2.5, 5, 5]


def test_student_may_be_tapped_before_the_activation(data, teacher, student) -> None:
    session = start(ReviewKD(student_preactivation=True), student, teacher, data)
    output = session.student(data.rows(slice(2)))
    assert output.features["stage1.preactivation"].min() < 0


def test_training_predicts_the_teachers_levels(data, teacher, student) -> None:
    history = train(ReviewKD(warmup_epochs=1), student, teacher, data, epochs=3)
    assert history[-1]["review"] < 0.6 * history[0]["review"]
    assert agreement(student, teacher, data.inputs) > 0.8


@pytest.mark.parametrize("preactivation", [False, True])
def test_linear_bottlenecks_learn_and_teach(data, teacher, preactivation: bool) -> None:
    torch.manual_seed(0)
    mobile = MobileNetV2(num_classes=10, in_channels=1, width=0.25)
    few = data.rows(slice(16))
    pairs = [(mobile, teacher), (ConvNet(width=4), mobile)]
    for student, other in pairs:
        method = ReviewKD(student_preactivation=preactivation)
        terms = start(method, student, other, few).terms(few, Progress(0, 1, 0, 1))
        assert torch.isfinite(terms["review"]) and terms["review"] > 0
