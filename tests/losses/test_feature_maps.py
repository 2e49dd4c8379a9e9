from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdrun.losses.feature_maps import (
    attention_distance,
    attention_map,
    average_pool,
    gaussian_negative_log_likelihood,
    pool_to_smaller,
    selectivity_discrepancy,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (4, 2), (3, 2), (3, 5), (8, 6), (11, 7)])
def test_average_pooling_has_the_values_and_gradient_of_adaptive_pooling(size) -> None:
    ours, theirs = (random(2, 3, 8, 6).requires_grad_() for _ in range(2))
    pooled, expected = average_pool(ours, size), F.adaptive_avg_pool2d(theirs, size)
    torch.testing.assert_close(pooled, expected)
    # What tells them apart: CUDA has no deterministic gradient of the other.
    assert "Adaptive" not in pooled.grad_fn.name()
    (pooled**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_larger_map_is_pooled() -> None:
    large, small = random(2, 3, 8, 8), random(2, 5, 4, 4)
    pooled = F.avg_pool2d(large, 2)
    for first, second in [pool_to_smaller(large, small), pool_to_smaller(small, large)[::-1]]:
        torch.testing.assert_close(first, pooled)
        assert second is small


def test_attention_map_by_hand() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[1.0, 0.0]]]])
    # Means of squares (1, 2), over their norm sqrt(5).
    expected = torch.tensor([[1.0, 2.0]]) / 5**0.5
    torch.testing.assert_close(attention_map(features), expected)


def test_attention_distance_is_a_mean_over_samples_and_positions() -> None:
    student, teacher = random(3, 2, 4, 4), random(3, 5, 4, 4, seed=1)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        ours, theirs = ((f**2).mean(0) for f in (s, t))
        ours, theirs = ours / ours.norm(), theirs / theirs.norm()
        expected += float(((ours - theirs) ** 2).sum())
    assert attention_distance(student, teacher).item() == pytest.approx(expected / (3 * 16))


def test_attention_of_one_constant_channel_is_equal_everywhere() -> None:
    student, teacher = torch.full((2, 1, 4, 4), 3.0), torch.full((2, 1, 4, 4), 0.5)
    assert attention_distance(student, teacher).item() == pytest.approx(0, abs=1e-12)


def test_attention_is_invariant_to_scale() -> None:
    student, teacher = random(3, 2, 4, 4), random(3, 5, 4, 4, seed=1)
    torch.testing.assert_close(
        attention_distance(7 * student, teacher / 3), attention_distance(student, teacher)
    )


def test_gradient_by_finite_differences() -> None:
    student, teacher = random(2, 2, 4, 4).requires_grad_(), random(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: attention_distance(s, teacher), student)


def test_selectivity_is_the_naive_loop() -> None:
    student, teacher = random(2, 3, 2, 2), random(2, 4, 2, 2, seed=1)

    def mean_kernel(first, second) -> float:
        values = [
            float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) ** 2
            for a in first
            for b in second
        ]
        return sum(values) / len(values)

    expected = sum(
        mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)
        for s, t in zip(student, teacher, strict=True)
    )
    assert selectivity_discrepancy(student, teacher).item() == pytest.approx(expected / 2)


def test_selectivity_is_invariant_to_scale_and_order_of_channels() -> None:
    student, teacher = random(2, 3, 4, 4), random(2, 5, 4, 4, seed=1)
    expected = selectivity_discrepancy(student, teacher)
    torch.testing.assert_close(selectivity_discrepancy(7 * student.flip(1), teacher), expected)
    assert selectivity_discrepancy(student, student).item() == pytest.approx(0, abs=1e-12)


def test_likelihood_is_that_of_torch() -> None:
    mean, target = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    variance = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)[:, None, None]
    expected = F.gaussian_nll_loss(mean, target, variance.expand_as(mean))
    torch.testing.assert_close(gaussian_negative_log_likelihood(mean, target, variance), expected)
