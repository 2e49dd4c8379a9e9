"""How well scores rank what they are to rank."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path


def correlations(scores: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    """``spearman`` and ``kendall`` (tau-b) rank correlation and ``pearson`` correlation.

    Raises:
        ValueError: fewer than three pairs, or one side is constant.
    """
    from scipy import stats

    if len(scores) != len(truth) or len(scores) < 3:
        raise ValueError(f"{len(scores)} scores and {len(truth)} true values cannot be compared")
    if len(set(scores)) == 1 or len(set(truth)) == 1:
        raise ValueError("values that are all equal have no order")
    return {
        "spearman": float(stats.spearmanr(scores, truth).statistic),
        "kendall": float(stats.kendalltau(scores, truth).statistic),
        "pearson": float(stats.pearsonr(scores, truth).statistic),
    }


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1, the smallest; equal values share the mean of their ranks."""
    from scipy import stats

    return stats.rankdata(values).tolist()


def published_depths() -> dict[tuple[int, ...], tuple[float, float]]:
    """CIFAR-100 top-1 of 64 ResNets by the blocks in their three stages: alone, distilled.

    From the released code of DisWOT (Dong et al., CVPR 2023); widths 16, 32 and 64, the teacher of
    the distilled ones is a ResNet-56.
    """
    path = Path(__file__).with_name("resnet_depths_cifar100.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        tuple(json.loads(row["blocks"])): (float(row["alone"]), float(row["distilled"]))
        for row in rows
    }
