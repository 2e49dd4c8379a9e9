from __future__ import annotations

import pytest
import torch

from kdrun.methods.dkd import DKD
from kdrun.methods.kd import KD
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, train


def test_weights_rise_over_the_warm_up_counted_from_one() -> None:
    method = DKD(beta=8.0, warmup_epochs=4)
    factors = [method.weights(Progress(epoch, 10, 0, 1)) for epoch in range(6)]
    assert [f["target_class"] for f in factors] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [f["non_target_class"] for f in factors] == [2, 4, 6, 8, 8, 8]
    assert all(f["supervised"] == 1 for f in factors)


def test_with_the_teachers_doubt_as_factor_it_is_kd() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    student, teacher = (ModelOutput(one) for one in logits)
    batch = Batch(torch.zeros(1, 1), torch.tensor([3]), torch.tensor([0]))
    progress = Progress(0, 1, 0, 1)
    split = DKD(temperature=1.0).losses(student, {"teacher": teacher}, batch, progress)
    whole = KD(temperature=1.0).losses(student, {"teacher": teacher}, batch, progress)
    doubt = 1 - teacher.logits.softmax(1)[0, 3]
    torch.testing.assert_close(
        split["target_class"] + doubt * split["non_target_class"], whole["kd"]
    )


def test_mixed_targets_are_refused() -> None:
    inputs, index = torch.zeros(4, 1), torch.arange(4)
    DKD().inspect([Batch(inputs, index, index)])
    with pytest.raises(ValueError, match="mixup and CutMix must be off"):
        DKD().inspect([Batch(inputs, torch.full((4, 3), 1 / 3), index)])


def test_training_brings_the_student_to_the_teacher(data, teacher, student) -> None:
    history = train(DKD(beta=2.0, warmup_epochs=1), student, teacher, data, epochs=3)
    assert history[-1]["target_class"] < 0.5 * history[0]["target_class"]
    assert history[-1]["non_target_class"] < 0.5 * history[0]["non_target_class"]
    assert agreement(student, teacher, data.inputs) == pytest.approx(1, abs=0.1)
