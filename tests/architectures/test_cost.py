from __future__ import annotations

import pytest
import torch

from kdrun.architectures.cost import Budget, Cost, cost_of
from kdrun.architectures.ranking import correlations, published_depths, ranks
from kdrun.models.mlp import MLP
from kdrun.models.resnet import ResNet


def test_cost_of_a_perceptron_by_hand() -> None:
    sample = torch.empty(1, 12, device="meta")
    cost = cost_of(lambda: MLP(num_classes=3, input_shape=(12,), hidden=(5,)), sample)
    assert cost == Cost(12 * 5 + 5 + 5 * 3 + 3, 12 * 5 + 5 * 3, 2)


def test_cost_of_a_resnet() -> None:
    """41 M multiply-adds and 0.27 M parameters, as the paper of ResNets has them for ResNet-20."""
    sample = torch.empty(1, 3, 32, 32, device="meta")
    cost = cost_of(lambda: ResNet(num_classes=10), sample)
    assert cost.parameters == sum(p.numel() for p in ResNet(num_classes=10).parameters())
    assert cost.multiply_adds == pytest.approx(41e6, rel=0.01)
    assert cost.layers == 19 + 2 + 1


def test_budgets() -> None:
    cost = Cost(100, 2000, 5)
    assert Budget().admits(cost) and Budget(100, 2000, 5).admits(cost)
    for budget in (Budget(parameters=99), Budget(multiply_adds=1999), Budget(layers=4)):
        assert not budget.admits(cost)


def test_correlations() -> None:
    found = correlations([1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 5.0, 100.0])
    assert found["spearman"] == pytest.approx(0.8)
    assert found["kendall"] == pytest.approx(2 / 3)
    assert found["pearson"] == pytest.approx(0.7940, abs=1e-4)
    assert ranks([3.0, 1.0, 3.0]) == [2.5, 1.0, 2.5]
    with pytest.raises(ValueError, match="all equal"):
        correlations([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="2 scores and 2 true values"):
        correlations([1.0, 2.0], [1.0, 2.0])


def test_the_published_accuracies() -> None:
    """Facts that the authors' numbers are known by."""
    published = published_depths()
    assert len(published) == 64
    assert max(published, key=lambda blocks: published[blocks][1]) == (5, 5, 7)
    assert published[(5, 5, 7)] == (71.93, 74.86)
    assert max(published, key=lambda blocks: published[blocks][0]) == (7, 7, 7)
    alone, distilled = zip(*published.values(), strict=True)
    assert correlations(alone, distilled)["kendall"] == pytest.approx(0.836, abs=5e-4)
    sample = torch.empty(1, 3, 32, 32, device="meta")
    parameters = [
        cost_of(lambda b=blocks: ResNet(num_classes=100, blocks=b), sample).parameters
        for blocks in published
    ]
    assert correlations(parameters, distilled)["spearman"] == pytest.approx(0.968, abs=5e-3)
    depths = [float(sum(blocks)) for blocks in published]
    assert correlations(depths, distilled)["spearman"] == pytest.approx(0.814, abs=5e-3)
