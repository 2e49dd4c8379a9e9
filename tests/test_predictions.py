from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from kdrun.evaluation import Predictions
from kdrun.outputs import Batch, ModelOutput
from kdrun.tasks.classification import Classification
from kdrun.tasks.task import Task


def test_what_networks_say_of_each_sample_is_kept_in_order(tmp_path: Path) -> None:
    task = Classification(num_classes=3)
    predictions = Predictions()
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0]]).log_softmax(-1)
    for rows in (slice(0, 2), slice(2, 3)):
        batch = Batch(torch.zeros(3, 1), torch.tensor([0, 1, 1]), torch.tensor([7, 5, 6])).rows(
            rows
        )
        outputs = {"teacher": ModelOutput(logits[rows]), "alone/last": ModelOutput(-logits[rows])}
        predictions.update(outputs, batch, task)
    predictions.save(tmp_path / "p.safetensors")
    kept = safetensors.numpy.load_file(tmp_path / "p.safetensors")
    assert kept["index"].tolist() == [7, 5, 6]
    assert kept["target"].tolist() == [0, 1, 1]
    assert kept["teacher/prediction"].tolist() == [0, 2, 1]
    np.testing.assert_allclose(kept["teacher/confidence"], logits.exp().max(-1).values, rtol=1e-6)
    assert kept["alone/last/prediction"].shape == (3,)
    assert {value.dtype.name for value in kept.values()} == {"int32", "float32"}


def test_only_what_counts_is_kept(tmp_path: Path) -> None:
    predictions = Predictions()
    mask = torch.tensor([True, False, True])
    batch = Batch(torch.zeros(3, 1), torch.tensor([0, -100, 2]), torch.arange(3), mask)
    outputs = {"teacher": ModelOutput(torch.eye(3))}
    predictions.update(outputs, batch, Classification(num_classes=3))
    predictions.save(tmp_path / "p.safetensors")
    kept = safetensors.numpy.load_file(tmp_path / "p.safetensors")
    assert kept["index"].tolist() == kept["target"].tolist() == [0, 2]
    assert kept["teacher/prediction"].tolist() == [0, 2]


class Tokens(Task):
    """A task with many predictions per sample."""


def test_tasks_without_one_prediction_per_sample_leave_no_file(tmp_path: Path) -> None:
    predictions = Predictions()
    batch = Batch(torch.zeros(2, 4), torch.zeros(2, 4), torch.arange(2))
    predictions.update({"teacher": ModelOutput(torch.zeros(2, 4, 9))}, batch, Tokens())
    predictions.save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())
