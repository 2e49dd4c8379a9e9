from __future__ import annotations

import pytest
import torch

from kdrun.losses.feature_maps import attention_distance
from kdrun.methods.at import AT
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, train


def test_stages_are_summed_from_the_deepest() -> None:
    generator = torch.Generator().manual_seed(0)

    def output(stages: int, channels: int) -> ModelOutput:
        maps = {
            f"stage{i}": torch.randn(2, channels, 16 >> i, 16 >> i, generator=generator)
            for i in range(4 - stages + 1, 5)
        }
        features = dict(zip((f"stage{i + 1}" for i in range(stages)), maps.values(), strict=True))
        return ModelOutput(torch.zeros(2, 3), features)

    student, teacher = output(2, 3), output(4, 5)
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([0, 1]))
    terms = AT().losses(student, {"teacher": teacher}, batch, Progress(0, 1, 0, 1))
    expected = attention_distance(student.features["stage1"], teacher.features["stage3"])
    expected += attention_distance(student.features["stage2"], teacher.features["stage4"])
    torch.testing.assert_close(terms["attention"], expected)


def test_a_power_whose_gradient_is_infinite_at_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"power=0\.5 must be at least 1"):
        AT(power=0.5)
    maps = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]], requires_grad=True)
    attention_distance(maps, torch.ones(1, 1, 2, 2), power=1.0).backward()
    assert maps.grad.isfinite().all()


def test_training_moves_the_attention(data, teacher, student) -> None:
    # The default weight is made for maps of 32x32 to 8x8; these have 8x8 to 2x2 positions.
    history = train(AT(weight=20.0), student, teacher, data, epochs=3)
    assert history[-1]["attention"] < 0.5 * history[0]["attention"]
    assert agreement(student, teacher, data.inputs) > 0.8
