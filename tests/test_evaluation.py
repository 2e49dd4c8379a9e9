"""Agreement with a reference network, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kdrun.evaluation import Fidelity, evaluation_device, parameter_count
from kdrun.outputs import Batch, ModelOutput
from tests.tiny import mlp


def batch(mask: torch.Tensor | None = None) -> Batch:
    return Batch(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), torch.arange(2), mask)


def logits(*probabilities: list[float]) -> ModelOutput:
    return ModelOutput(torch.tensor(probabilities).log())


def test_fidelity_by_hand() -> None:
    """KL((3/4, 1/4) || (1/2, 1/2)) is log 2 - H(3/4); of equal distributions it is 0."""
    fidelity = Fidelity(torch.device("cpu"))
    reference = logits([0.75, 0.25], [0.2, 0.8])
    fidelity.update(logits([0.49999, 0.50001], [0.2, 0.8]), reference, batch())
    found = fidelity.compute()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["kl"] == pytest.approx((math.log(2) - entropy) / 2, rel=1e-3)
    assert found["agreement"] == 50.0


def test_fidelity_is_a_mean_over_samples_not_over_batches() -> None:
    whole, parts = (Fidelity(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 3), torch.randn(5, 3)
    everything = Batch(ours, torch.zeros(5, dtype=torch.long), torch.arange(5))
    whole.update(ModelOutput(ours), ModelOutput(theirs), everything)
    for rows in (slice(0, 4), slice(4, 5)):
        parts.update(ModelOutput(ours[rows]), ModelOutput(theirs[rows]), everything.rows(rows))
    assert parts.compute() == pytest.approx(whole.compute())


def test_masked_positions_do_not_count() -> None:
    fidelity = Fidelity(torch.device("cpu"))
    mask = torch.tensor([True, False])
    fidelity.update(logits([0.75, 0.25], [0.9, 0.1]), logits([0.75, 0.25], [0.1, 0.9]), batch(mask))
    assert fidelity.compute() == pytest.approx({"kl": 0.0, "agreement": 100.0}, abs=1e-6)


def test_parameters_are_counted_trained_or_not() -> None:
    network = mlp(0, 8)
    count = 64 * 8 + 8 + 8 * 10 + 10
    assert parameter_count(network) == count
    assert parameter_count(network.requires_grad_(False)) == count


def test_the_device_of_an_accelerator() -> None:
    assert evaluation_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert evaluation_device("auto") == torch.device("cpu")
