from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdrun.outputs import Batch, ModelOutput
from kdrun.tasks.classification import Classification


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


MASK = torch.tensor([True, False, True, True, False, False])
TARGET = torch.tensor([0, -100, 2, 1, -100, -100])


def masked() -> Batch:
    return Batch(torch.zeros(6, 1), TARGET, torch.arange(6), MASK)


def chosen() -> Batch:
    return Batch(torch.zeros(3, 1), TARGET[MASK], torch.arange(6)[MASK])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_over_the_samples_that_count(logits, smoothing: float) -> None:
    task = Classification(num_classes=3, label_smoothing=smoothing)
    logits.requires_grad_()
    loss = task.supervised_loss(ModelOutput(logits), masked())
    expected = F.cross_entropy(logits[MASK], TARGET[MASK], label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not logits.grad[~MASK].any() and logits.grad[MASK].all()


def test_the_metrics_are_of_the_samples_that_count(logits) -> None:
    task = Classification(num_classes=3)
    values = []
    for rows, batch in ((logits, masked()), (logits[MASK], chosen())):
        metrics = task.metrics()
        task.update_metrics(metrics, ModelOutput(rows), batch)
        values.append(task.compute(metrics))
    assert values[0] == pytest.approx(values[1])
    assert set(values[0]) == {"accuracy", "loss", "ece"}
