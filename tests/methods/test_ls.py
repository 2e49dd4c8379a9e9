from __future__ import annotations

import pytest
import torch

from kdrun.losses.divergence import kl_divergence, standardize
from kdrun.methods.dkd import DKD
from kdrun.methods.ls import LS
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, train

NOW = Progress(0, 1, 0, 1)


def outputs() -> tuple[ModelOutput, ModelOutput, Batch]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, dtype=torch.float64, generator=generator)
    student = ModelOutput(logits[0], views={"strong": ModelOutput(logits[1])})
    teacher = ModelOutput(logits[2], views={"strong": ModelOutput(logits[3])})
    return student, teacher, Batch(logits[0], torch.arange(6) % 5, torch.arange(6))


def moved(output: ModelOutput) -> ModelOutput:
    scale = torch.arange(1, 7, dtype=torch.float64)[:, None]
    views = {"strong": ModelOutput(2 * output.views["strong"].logits + 1)}
    return ModelOutput(scale * output.logits - 3 * scale, views=views)


def test_standardised_logits_have_mean_zero_and_unbiased_deviation_one() -> None:
    logits = torch.tensor([[1.0, 2.0, 6.0]])
    # Mean 3, sum of squares 4 + 1 + 9 over 2.
    expected = torch.tensor([[-2.0, -1.0, 3.0]]) / 7**0.5
    torch.testing.assert_close(standardize(logits), expected)


@pytest.mark.parametrize(
    ("base", "terms"),
    [("kd", ["kd"]), ("dkd", ["target_class", "non_target_class"]), ("mlld", ["instance"])],
)
def test_invariant_to_positive_affine_maps_of_logits(base: str, terms: list[str]) -> None:
    student, teacher, batch = outputs()
    method = LS(base=base)
    expected = method.losses(student, {"teacher": teacher}, batch, NOW)
    # The mask of mlld comes from the teacher's plain probabilities: only the student moves.
    actual = method.losses(moved(student), {"teacher": teacher}, batch, NOW)
    for term in terms:
        torch.testing.assert_close(actual[term], expected[term], rtol=1e-5, atol=1e-8)


def test_kd_is_that_of_standardised_logits() -> None:
    student, teacher, batch = outputs()
    expected = kl_divergence(
        standardize(student.logits), standardize(teacher.logits), temperature=2.0, t_squared=True
    )
    method = LS()
    terms = method.losses(student, {"teacher": teacher}, batch, NOW)
    torch.testing.assert_close(terms["kd"], expected)
    assert method.weights(NOW) == {"supervised": 0.1, "kd": 9.0}


def test_what_the_base_refuses_is_refused() -> None:
    _, _, batch = outputs()
    mixed = Batch(batch.inputs, torch.full((6, 5), 0.2), batch.index)
    for base in ("kd", "dkd", "mlld"):
        LS(base=base).inspect([batch])
    with pytest.raises(ValueError, match="mixup and CutMix must be off"):
        LS(base="dkd").inspect([mixed])


def test_the_supervised_term_sees_plain_logits() -> None:
    student, teacher, batch = outputs()
    method = LS()
    method.supervised_loss = lambda output, batch: output.logits.sum()
    method.setup(student, {"teacher": teacher})
    terms = method.losses(student, {"teacher": teacher}, batch, NOW)
    assert terms["supervised"] == student.logits.sum()


def test_weight_multiplies_both_factors_of_dkd() -> None:
    method = LS(base="dkd", weight=9.0, alpha=1.0, beta=8.0, warmup_epochs=1)
    assert method.weights(NOW) == {
        "supervised": 1.0,
        "target_class": 9.0,
        "non_target_class": 72.0,
    }
    assert isinstance(method.base, DKD)


def test_mlld_brings_its_view_and_looks_at_the_batch() -> None:
    method = LS(base="mlld")
    assert method.views == ("strong",)
    assert method.relational
    assert not LS().views
    assert not LS().relational


def test_training_brings_the_student_to_the_teacher(data, teacher, student) -> None:
    history = train(LS(), student, teacher, data, epochs=3)
    assert history[-1]["kd"] < 0.3 * history[0]["kd"]
    assert agreement(student, teacher, data.inputs) > 0.9
