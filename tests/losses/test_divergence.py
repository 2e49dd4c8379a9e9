from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from kdrun.losses.divergence import (
    decoupled_divergence,
    entropy,
    kl_divergence,
    mean_over,
    soft_cross_entropy,
)


def random_logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_kl_of_two_classes_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    value = kl_divergence(student, teacher, temperature=2.0, t_squared=True)
    assert value.item() == pytest.approx(0.44378, abs=1e-5)
    plain = kl_divergence(student, teacher, temperature=2.0, t_squared=False)
    assert plain.item() == pytest.approx(0.44378 / 4, abs=1e-5)


def test_kl_is_the_naive_loop() -> None:
    student, teacher = random_logits(2, 5, 7).unbind()
    expected = 0.0
    for s, t in zip((student / 3).softmax(1), (teacher / 3).softmax(1), strict=True):
        expected += sum(float(q * math.log(q / p)) for p, q in zip(s, t, strict=True)) / 5
    value = kl_divergence(student, teacher, temperature=3.0, t_squared=False)
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("one", "other"), [((5, 1, 7), (5, 3, 7)), ((5, 1, 7), (1, 3, 7))])
def test_kl_of_positions_that_are_broadcast(one: tuple, other: tuple) -> None:
    student, teacher = random_logits(*one), random_logits(*other).flip(-1)
    full = [side.expand(5, 3, 7) for side in (student, teacher)]
    value, again = (kl_divergence(*sides, t_squared=False) for sides in ((student, teacher), full))
    assert value.item() == pytest.approx(again.item(), rel=1e-12)
    masked = kl_divergence(*full, t_squared=False, mask=torch.ones(5, 3))
    assert value.item() == pytest.approx(masked.item(), rel=1e-12)


def test_cross_entropy_form_is_kl_plus_the_teachers_entropy() -> None:
    student, teacher = random_logits(2, 5, 7).unbind()
    log_teacher = F.log_softmax(teacher / 2, dim=1)
    entropy = -(log_teacher.exp() * log_teacher).sum(1).mean()
    settings = {"temperature": 2.0, "t_squared": False}
    difference = soft_cross_entropy(student, teacher, **settings) - kl_divergence(
        student, teacher, **settings
    )
    torch.testing.assert_close(difference, entropy)


def test_cross_entropy_form_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    teacher = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    value = soft_cross_entropy(student, teacher, temperature=2.0, t_squared=False)
    assert value.item() == pytest.approx(1.082988, abs=1e-6)


@pytest.mark.parametrize("divergence", [kl_divergence, soft_cross_entropy])
def test_masked_positions_do_not_count(divergence) -> None:
    student, teacher = random_logits(2, 3, 4, 6).unbind()
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    settings = {"temperature": 2.0, "t_squared": True}
    expected = divergence(student[mask], teacher[mask], **settings)
    student = student.masked_fill(~mask[..., None], math.nan)
    torch.testing.assert_close(divergence(student, teacher, **settings, mask=mask), expected)


def test_mean_over_nothing_is_zero_with_zero_gradient() -> None:
    values = torch.ones(3, requires_grad=True)
    mean = mean_over(values, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0
    assert values.grad.tolist() == [0, 0, 0]


def test_decoupled_terms_add_up_to_kl() -> None:
    student, teacher = random_logits(2, 5, 7).unbind()
    target = torch.tensor([0, 6, 3, 3, 1])
    remaining = 1 - teacher.softmax(1).gather(1, target[:, None]).squeeze(1)
    for row in range(5):
        rows = slice(row, row + 1)
        settings = {"temperature": 1.0, "t_squared": False}
        of_target, among_others = decoupled_divergence(
            student[rows], teacher[rows], target[rows], **settings
        )
        total = kl_divergence(student[rows], teacher[rows], **settings)
        torch.testing.assert_close(of_target + remaining[row] * among_others, total)


def test_decoupled_terms_are_those_of_the_reduced_distributions() -> None:
    student, teacher = random_logits(2, 4, 5).unbind()
    target = torch.tensor([2, 0, 4, 2])
    of_target, among_others = decoupled_divergence(
        student, teacher, target, temperature=2.0, t_squared=True
    )
    expected_target, expected_others = 0.0, 0.0
    for s, t, y in zip(student / 2, teacher / 2, target, strict=True):
        p, q = s.softmax(0), t.softmax(0)
        others = [c for c in range(5) if c != y]
        expected_target += q[y] * torch.log(q[y] / p[y])
        expected_target += (1 - q[y]) * torch.log((1 - q[y]) / (1 - p[y]))
        p, q = s[others].softmax(0), t[others].softmax(0)
        expected_others += (q * (q / p).log()).sum()
    # Times T^2 = 4, over 4 samples.
    torch.testing.assert_close(of_target, expected_target)
    torch.testing.assert_close(among_others, expected_others)


def test_decoupled_stays_finite_where_the_teacher_is_certain() -> None:
    student = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    teacher = torch.tensor([[300.0, 1.0, 0.0]])
    terms = decoupled_divergence(
        student, teacher, torch.tensor([0]), temperature=1.0, t_squared=True
    )
    sum(terms).backward()
    assert torch.isfinite(torch.stack(terms)).all()
    assert torch.isfinite(student.grad).all()


def test_decoupled_reads_no_target_at_masked_positions() -> None:
    student, teacher = random_logits(2, 2, 3, 5).unbind()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    target = torch.tensor([[1, 2, -100], [4, -100, -100]])
    settings = {"temperature": 2.0, "t_squared": False}
    expected = decoupled_divergence(student[mask], teacher[mask], target[mask], **settings)
    actual = decoupled_divergence(student, teacher, target, **settings, mask=mask)
    torch.testing.assert_close(actual, expected)


def test_gradients_by_finite_differences() -> None:
    student, teacher = random_logits(2, 3, 4).unbind()
    target = torch.tensor([0, 3, 1])
    student.requires_grad_()
    settings = {"temperature": 2.0, "t_squared": True}
    assert torch.autograd.gradcheck(lambda s: kl_divergence(s, teacher, **settings), student)
    assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(s, teacher, **settings), student)
    assert torch.autograd.gradcheck(
        lambda s: decoupled_divergence(s, teacher, target, **settings), student
    )


@pytest.mark.parametrize("t_squared", [False, True])
def test_t_squared_is_a_factor(t_squared: bool) -> None:
    student, teacher = random_logits(2, 3, 4).unbind()
    value = kl_divergence(student, teacher, temperature=3.0, t_squared=t_squared)
    softened = kl_divergence(student / 3, teacher / 3, t_squared=False)
    torch.testing.assert_close(value, softened * (9 if t_squared else 1))


def test_half_precision_is_computed_in_single() -> None:
    student, teacher = random_logits(2, 3, 4).bfloat16().unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = kl_divergence(student, teacher, t_squared=False)
    assert value.dtype == torch.float32
    assert value == kl_divergence(student.float(), teacher.float(), t_squared=False)


def test_decoupled_refuses_mixed_targets() -> None:
    logits = random_logits(3, 4)
    with pytest.raises(ValueError, match="class ids"):
        decoupled_divergence(logits, logits, logits.softmax(1), temperature=1.0, t_squared=False)


def test_entropy_of_a_fair_coin_of_certainty_and_of_the_naive_loop() -> None:
    assert entropy(torch.tensor([[0.0, 0.0]])).item() == pytest.approx(math.log(2))
    assert entropy(torch.tensor([[1e4, 0.0]])).item() == 0
    logits = random_logits(4, 5)
    for row, value in zip(logits, entropy(logits, 3.0), strict=True):
        probabilities = (row / 3).softmax(0).tolist()
        expected = -sum(p * math.log(p) for p in probabilities)
        assert value.item() == pytest.approx(expected, rel=1e-12)
