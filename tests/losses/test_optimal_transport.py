from __future__ import annotations

import pytest
import torch

from kdrun.losses.optimal_transport import pairwise_l1, sinkhorn_plan


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_domain(cost: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    plan = torch.exp(-cost / epsilon)
    for _ in range(iterations):
        plan = plan / plan.sum(dim=1, keepdim=True)
        plan = plan / plan.sum(dim=0, keepdim=True)
    return plan


def test_pairwise_l1_is_the_naive_loop() -> None:
    first, second = random(4, 3), random(5, 3, seed=1)
    expected = torch.stack([torch.stack([(a - b).abs().sum() for b in second]) for a in first])
    torch.testing.assert_close(pairwise_l1(first, second), expected)


def test_pairwise_l1_takes_leading_dimensions() -> None:
    first, second = random(2, 4, 3), random(2, 5, 3, seed=1)
    expected = torch.stack([pairwise_l1(a, b) for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(pairwise_l1(first, second), expected)


def test_gradient_of_pairwise_l1_is_the_sign_and_zero_at_ties() -> None:
    first = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    second = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True)
    pairwise_l1(first, second).sum().backward()
    assert first.grad.tolist() == [[0, -1, 1]]
    assert second.grad.tolist() == [[0, 1, -1]]


def test_plan_is_that_of_the_plain_domain() -> None:
    cost = 2 * random(6, 6)
    torch.testing.assert_close(
        sinkhorn_plan(cost, epsilon=0.1, iterations=20),
        plain_domain(cost, 0.1, 20),
        atol=1e-12,
        rtol=1e-9,
    )
    single = sinkhorn_plan(cost.float(), epsilon=0.1, iterations=20).double()
    torch.testing.assert_close(single, plain_domain(cost, 0.1, 20), atol=1e-6, rtol=0)


def test_columns_sum_to_one_and_rows_converge() -> None:
    cost = 2 * random(6, 6)
    plan = sinkhorn_plan(cost, epsilon=0.1, iterations=20)
    torch.testing.assert_close(plan.sum(dim=0), torch.ones(6, dtype=torch.float64))
    errors = [
        (sinkhorn_plan(cost, epsilon=0.5, iterations=n).sum(dim=1) - 1).abs().max()
        for n in (1, 5, 25)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_rows_come_before_columns() -> None:
    cost = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    # One row: after the row step a softmax, after the column step ones.
    plan = sinkhorn_plan(cost, epsilon=1.0, iterations=1)
    torch.testing.assert_close(plan, torch.ones_like(plan))
    plan = sinkhorn_plan(cost.T, epsilon=1.0, iterations=1)
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / 3))


def test_log_domain_survives_where_the_kernel_underflows() -> None:
    cost = 2 * random(6, 6).float()
    cost.requires_grad_()
    plan = sinkhorn_plan(cost, epsilon=1e-3, iterations=20)
    (plan * cost).sum().backward()
    assert torch.isnan(plain_domain(cost.detach(), 1e-3, 20)).any()
    assert torch.isfinite(plan).all()
    assert torch.isfinite(cost.grad).all()


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_gradient_flows_through_every_iteration(epsilon: float) -> None:
    cost = (2 * random(3, 3)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c: sinkhorn_plan(c, epsilon=epsilon, iterations=20), cost
    )


def test_gradient_of_the_cost_of_two_clouds() -> None:
    first, second = random(3, 4).requires_grad_(), random(3, 4, seed=1)

    def transport_cost(points: torch.Tensor) -> torch.Tensor:
        cost = pairwise_l1(points, second)
        return (sinkhorn_plan(cost, epsilon=0.1, iterations=20) * cost).sum()

    assert torch.autograd.gradcheck(transport_cost, first)
