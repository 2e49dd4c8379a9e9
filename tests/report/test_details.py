from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from kdrun.report.details import (
    agreement,
    confusion,
    curves_of,
    predictions_of,
    read_curves,
    reliability,
    right_and_wrong,
)
from kdrun.tasks.classification import Classification

from .conftest import write_run


def test_reliability_by_hand() -> None:
    confidence = np.array([0.1, 0.2, 0.9, 1.0], dtype=np.float32)
    found = reliability(confidence, np.array([False, True, True, True]), bins=2)
    np.testing.assert_allclose(found.confidence, [0.15, 0.95], rtol=1e-6)
    assert found.accuracy.tolist() == [0.5, 1.0]
    assert found.share.tolist() == [0.5, 0.5]
    assert found.error == pytest.approx(100 * (0.35 + 0.05) / 2)


def test_the_calibration_error_is_that_of_the_results() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 7, generator=generator) * 2
    target = torch.randint(7, (500,), generator=generator)
    metric = Classification(num_classes=7).metrics()["ece"]
    metric.update(logits.softmax(-1), target)
    confidence, predicted = logits.softmax(-1).max(-1)
    found = reliability(confidence.numpy(), (predicted == target).numpy())
    assert found.error == pytest.approx(100 * float(metric.compute()), abs=1e-4)


def test_confusion_and_agreement_by_hand() -> None:
    target = np.array([0, 0, 1, 2])
    student, teacher = np.array([0, 1, 1, 0]), np.array([0, 0, 2, 0])
    assert confusion(target, student).tolist() == [[50, 50, 0], [0, 100, 0], [100, 0, 0]]
    assert agreement(student, teacher) == 50.0
    assert list(right_and_wrong(target, student, teacher).values()) == [25, 25, 25, 25, 0]


def test_a_class_that_never_occurs_makes_no_nan() -> None:
    assert confusion(np.array([0, 2]), np.array([0, 2]))[1].tolist() == [0, 0, 0]


def test_curves_of_all_networks(tmp_path: Path) -> None:
    run = write_run(tmp_path, teacher="network/t")
    (run.directory / "metrics.csv").write_text("epoch,loss,extra\n1,0.5,\n2,0.25,3\n")
    store = tmp_path / "store" / "network" / "t"
    store.mkdir(parents=True)
    (store / "metrics.csv").write_text("epoch,loss\n1,9\n")
    found = curves_of(run, "distilled")
    assert found["loss"].tolist() == [0.5, 0.25]
    assert np.isnan(found["extra"][0]) and found["extra"][1] == 3
    assert curves_of(run, "teacher")["loss"].tolist() == [9]
    assert curves_of(run, "alone") is None
    (store / "metrics.csv").write_text("epoch,loss\n")
    assert read_curves(store / "metrics.csv") is None


def test_a_run_that_was_put_elsewhere_has_no_curves_of_shared_networks(tmp_path: Path) -> None:
    moved = replace(write_run(tmp_path), directory=Path("/seed0"))
    assert curves_of(moved, "teacher") is None


def test_predictions_of_the_wanted_epoch(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert predictions_of(run, "last") is None
    arrays = {"index": [5, 6], "target": [0, 1], "teacher/prediction": [1, 1]}
    arrays |= {"distilled/last/prediction": [0, 0], "distilled/best/prediction": [0, 1]}
    stored = {name: np.array(values, dtype=np.int32) for name, values in arrays.items()}
    for name in ("teacher", "distilled/last", "distilled/best"):
        stored[f"{name}/confidence"] = np.array([0.5, 0.75], dtype=np.float32)
    save_file(stored, run.directory / "predictions.safetensors")
    found = predictions_of(run, "best")
    assert found.predicted.keys() == {"teacher", "distilled"}
    assert found.predicted["distilled"].tolist() == [0, 1]
    assert predictions_of(run, "last").predicted["distilled"].tolist() == [0, 0]
    assert found.confidence["teacher"].tolist() == [0.5, 0.75]
