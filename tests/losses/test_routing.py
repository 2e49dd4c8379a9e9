"""Several teachers and a gate, on numbers done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kdrun.losses.divergence import kl_divergence
from kdrun.losses.routing import (
    balance_divergence,
    balance_variation,
    mixed_divergence,
    routed_divergence,
    shares,
)

STUDENT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
TEACHERS = torch.tensor(
    [
        [[2.0, 0.0, 0.0], [3.0, 0.0, 0.0]],
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [[0.0, 0.0, 3.0], [0.0, 1.0, 0.0]],
    ]
).transpose(0, 1)
GATES = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3001, 0.4]])
TEMPERED = {"temperature": 4.0, "t_squared": True}


def routed(k: int, teachers: torch.Tensor = TEACHERS, gates: torch.Tensor = GATES) -> float:
    chosen = gates.topk(k, dim=-1).indices
    return routed_divergence(STUDENT, teachers, chosen, **TEMPERED).item()


def test_the_divergence_of_both_directions() -> None:
    other = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert kl_divergence(STUDENT, other, **TEMPERED).item() == pytest.approx(0.467691, abs=1e-6)
    assert kl_divergence(other, STUDENT, **TEMPERED).item() == pytest.approx(0.477332, abs=1e-6)


def test_each_sample_learns_from_its_own_teachers() -> None:
    assert GATES.topk(1).indices.flatten().tolist() == [0, 2]
    assert GATES.topk(2).indices.tolist() == [[0, 1], [2, 1]]
    assert routed(1) == pytest.approx(0.121743, abs=1e-6)
    assert routed(2) == pytest.approx(0.350568, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_against_a_loop_over_samples(k: int) -> None:
    total = 0.0
    for row in range(2):
        for number in GATES[row].argsort(descending=True)[:k]:
            p = torch.softmax(TEACHERS[row, number] / 4, -1)
            q = torch.softmax(STUDENT[row] / 4, -1)
            total += 16 * float((p * (p / q).log()).sum())
    assert routed(k) == pytest.approx(total / (2 * k), rel=1e-5)


def test_the_order_of_the_teachers_does_not_matter() -> None:
    order = torch.tensor([2, 0, 1])
    assert routed(2, TEACHERS[:, order], GATES[:, order]) == pytest.approx(routed(2), rel=1e-6)


def test_with_all_teachers_the_gate_does_not_matter() -> None:
    means = [kl_divergence(STUDENT, TEACHERS[:, j], **TEMPERED).item() for j in range(3)]
    for gates in (GATES, GATES.flip(1)):
        assert routed(3, gates=gates) == pytest.approx(sum(means) / 3, rel=1e-6)


def test_zero_where_every_teacher_equals_the_student() -> None:
    assert routed(2, STUDENT.unsqueeze(1).expand(2, 3, 3)) == pytest.approx(0.0, abs=1e-7)


def test_the_mixture_is_the_teacher_the_gate_is_sure_of_and_trains_the_gate() -> None:
    sure = torch.eye(3)[[0, 2]]
    expected = routed_divergence(STUDENT, TEACHERS, torch.tensor([[0], [2]]), **TEMPERED)
    assert torch.allclose(mixed_divergence(STUDENT, TEACHERS, sure, **TEMPERED), expected)
    gates = GATES.clone().requires_grad_()
    mixed_divergence(STUDENT, TEACHERS, gates, **TEMPERED).backward()
    assert gates.grad.abs().sum() > 0


def test_balance_by_hand() -> None:
    # The mean gate is (1/2, 1/4, 1/4).
    gates = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    assert balance_divergence(gates).item() == pytest.approx(0.0188777, abs=1e-6)
    assert 3 * balance_divergence(gates).item() == pytest.approx(0.0566330, abs=1e-6)
    assert balance_variation(gates).item() == pytest.approx(0.4330127, abs=1e-6)
    # It is that of F.kl_div, whose batchmean divides a vector by its length.
    uniform = torch.full((3,), 1 / 3)
    theirs = torch.nn.functional.kl_div(gates.mean(0).log(), uniform, reduction="batchmean")
    assert torch.allclose(balance_divergence(gates), theirs)


def test_an_even_gate_is_balanced_and_an_unused_teacher_costs_a_finite_amount() -> None:
    even = torch.full((4, 3), 1 / 3)
    assert balance_divergence(even).item() == pytest.approx(0.0, abs=1e-7)
    assert balance_variation(even).item() == pytest.approx(0.0, abs=1e-6)
    never = torch.tensor([[1.0, 0.0]], requires_grad=True)
    value = balance_divergence(never)
    assert math.isfinite(value.item()) and value.item() > 1
    value.backward()
    assert torch.isfinite(never.grad).all()


def test_shares_sum_to_one() -> None:
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]])
    assert shares(chosen, 5).tolist() == [3 / 8, 3 / 8, 1 / 8, 1 / 8, 0.0]


def test_gradients_are_those_of_finite_differences() -> None:
    student, teachers = STUDENT.double().requires_grad_(), TEACHERS.double().requires_grad_()
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 1], [2, 1]])

    def everything(student, teachers, logits):
        gates = logits.softmax(-1)
        return (
            routed_divergence(student, teachers, chosen, **TEMPERED),
            mixed_divergence(student, teachers, gates, **TEMPERED),
            balance_divergence(gates),
            balance_variation(gates),
        )

    assert torch.autograd.gradcheck(everything, (student, teachers, logits))
