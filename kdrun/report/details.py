"""What a run's directory holds besides its result: curves, predictions, provenance."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdrun.errors import UserError
from kdrun.files import read_json
from kdrun.identity import output_directory
from kdrun.report.runs import Run

Curves = dict[str, np.ndarray]
"""Columns of a ``metrics.csv`` by name, a number per epoch; NaN where one is missing."""

STAGES = {"teacher": "teacher", "alone": "alone", "distilled": "distil"}
"""The stage that trained each network."""


def curves_of(run: Run, network: str) -> Curves | None:
    """The training of one network of a run, epoch by epoch; None where there is no record."""
    if network == "distilled":
        path = run.directory / "metrics.csv"
    else:
        name = run.artefacts.get(STAGES.get(network, network))
        if name is None:
            return None
        above = output_directory(run.directory)
        if above is None:
            return None
        path = above / "store" / name / "metrics.csv"
    return read_curves(path) if path.is_file() else None


def read_curves(path: Path) -> Curves | None:
    """The columns of a ``metrics.csv``; None for an empty one.

    Raises:
        UserError: it is damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            return None
        return {
            name: np.array([float(row[name]) if row[name] else np.nan for row in rows])
            for name in rows[0]
            if name is not None
        }
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class Predictions:
    """What the networks of a run said of each test sample.

    Attributes:
        target: class ids ``(N,)``.
        predicted: class ids ``(N,)`` by network (``teacher``, ``alone``, ``distilled``).
        confidence: the probability ``(N,)`` of each prediction by network.
    """

    target: np.ndarray
    predicted: Mapping[str, np.ndarray]
    confidence: Mapping[str, np.ndarray]


def predictions_of(run: Run, epoch: str) -> Predictions | None:
    """The predictions of a run's networks; None where it keeps none.

    Args:
        run: the run.
        epoch: ``last`` or ``best``, for networks that come with both.

    Raises:
        UserError: their file is damaged.
    """
    path = run.directory / "predictions.safetensors"
    if not path.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    predicted, confidence = {}, {}
    try:
        arrays = load_file(path)
        for name in arrays:
            label, _, what = name.rpartition("/")
            network, _, of_epoch = label.partition("/")
            if what == "prediction" and of_epoch in ("", epoch):
                predicted[network] = arrays[name]
                confidence[network] = arrays[f"{label}/confidence"]
        return Predictions(arrays["target"], predicted, confidence)
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in equal bins of confidence.

    Attributes:
        confidence: mean confidence of each bin that is not empty; ``accuracy`` likewise.
        share: of the samples in each of these bins.
        error: the expected calibration error, in percent.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray
    error: float


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Reliability:
    """The reliability diagram of a network, as ``ece`` in the results is computed."""
    edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    place = np.digitize(confidence, edges, right=True)
    counts = np.bincount(place, minlength=bins)
    used = counts > 0
    mean = np.bincount(place, confidence, bins)[used] / counts[used]
    accuracy = np.bincount(place, correct.astype(float), bins)[used] / counts[used]
    share = counts[used] / len(confidence)
    return Reliability(mean, accuracy, share, 100 * float(share @ np.abs(mean - accuracy)))


def confusion(target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """How often each class ``(row)`` was taken for each ``(column)``, in percent of the row."""
    classes = int(max(target.max(), predicted.max())) + 1
    flat = target.astype(np.int64) * classes + predicted
    counts = np.bincount(flat, minlength=classes**2).reshape(classes, classes)
    return 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """How often two networks say the same, right or wrong, in percent."""
    return 100 * float((first == second).mean())


def right_and_wrong(
    target: np.ndarray, student: np.ndarray, teacher: np.ndarray
) -> dict[str, float]:
    """Shares of the samples, in percent, by who of student and teacher is right."""
    s, t = student == target, teacher == target
    same = student == teacher
    return {
        "both right": 100 * float((s & t).mean()),
        "student only": 100 * float((s & ~t).mean()),
        "teacher only": 100 * float((~s & t).mean()),
        "both wrong, same answer": 100 * float((~s & ~t & same).mean()),
        "both wrong, other answers": 100 * float((~s & ~t & ~same).mean()),
    }


def read_provenance(run: Run) -> dict[str, Any]:
    """The content of a run's ``env.json``; empty where there is none."""
    path = run.directory / "env.json"
    return read_json(path) if path.is_file() else {}
