from __future__ import annotations

import pytest
import torch

from kdrun.methods.vid import VID, ChannelGaussian
from tests.methods.training import agreement, start, train


def test_variance_starts_where_it_is_told_and_is_trained() -> None:
    gaussian = ChannelGaussian(3, 5, variance=5.0)
    mean, variance = gaussian(torch.randn(2, 3, 4, 4))
    assert mean.shape == (2, 5, 4, 4)
    assert variance.flatten().tolist() == pytest.approx([5.0] * 5)
    variance.sum().backward()
    assert gaussian.rho.grad.abs().min() > 0


@pytest.mark.parametrize("variance", [1e-3, 1.0, 5.0, 1000.0])
def test_any_variance_may_be_the_first(variance: float) -> None:
    _, found = ChannelGaussian(1, 2, variance)(torch.zeros(1, 1, 2, 2))
    assert found.flatten().tolist() == pytest.approx([variance] * 2, rel=1e-5)


def test_a_variance_below_the_smallest_is_refused() -> None:
    with pytest.raises(ValueError, match="initial_variance=1e-05 must exceed 1e-5"):
        VID(initial_variance=1e-5)


def test_one_gaussian_per_stage(data, teacher, student) -> None:
    method = start(VID(), student, teacher, data).method
    assert [g.mean[0].in_channels for g in method.gaussians] == [4, 8, 16]
    assert [len(g.rho) for g in method.gaussians] == [12, 24, 48]


def test_training_raises_the_likelihood(data, teacher, student) -> None:
    method = VID(weight=3.0, initial_variance=1.0)
    history = train(method, student, teacher, data, epochs=3)
    assert history[-1]["likelihood"] < history[0]["likelihood"] - 0.5
    variances = torch.cat(
        [g(torch.zeros(1, c, 2, 2))[1] for g, c in zip(method.gaussians, (4, 8, 16), strict=True)]
    )
    assert variances.mean() < 0.8
    assert agreement(student, teacher, data.inputs) > 0.8
