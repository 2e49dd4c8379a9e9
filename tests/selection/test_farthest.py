"""Farthest-first traversal: hand numbers, a naive reference, invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrun.selection.farthest import cosine_to, euclidean_to, farthest_first
from kdrun.selection.strategies import probability_coreset

LABELLED = torch.tensor([[1.0, 0, 0]])
POOL = torch.tensor([[0.9, 0.1, 0], [0.1, 0.8, 0.1], [0, 0.1, 0.9], [0.34, 0.33, 0.33]])


def simplex(rows: int, classes: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, classes, generator=generator)).softmax(-1)


def test_by_hand() -> None:
    rows, radii = probability_coreset(POOL, LABELLED, 4)
    assert rows.tolist() == [2, 1, 3, 0]
    assert radii.tolist() == pytest.approx([1.3491, 1.0677, 0.5757, 0.1414], abs=1e-4)
    distances = euclidean_to(POOL)(LABELLED[0])
    assert distances.tolist() == pytest.approx([0.1414, 1.2083, 1.3491, 0.8083], abs=1e-4)


def naive(pool: Tensor, centres: Tensor, count: int) -> list[int]:
    known, chosen = [list(map(float, row)) for row in centres], []
    for _ in range(count):
        best, farthest = -1, -1.0
        for i, row in enumerate(pool.tolist()):
            if i in chosen:
                continue
            nearest = min(
                sum((a - b) ** 2 for a, b in zip(row, other, strict=True)) ** 0.5 for other in known
            )
            if nearest > farthest:
                best, farthest = i, nearest
        chosen.append(best)
        known.append(pool[best].tolist())
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_against_all_distances_computed_anew(seed: int) -> None:
    pool, labelled = simplex(25, seed=seed), simplex(4, seed=100 + seed)
    rows, _ = probability_coreset(pool, labelled, 12)
    assert rows.tolist() == naive(pool, labelled, 12)


def test_radii_never_rise_and_rows_are_distinct() -> None:
    rows, radii = probability_coreset(simplex(40), simplex(3, seed=1), 40)
    assert sorted(rows.tolist()) == list(range(40))
    assert (radii.diff() <= 0).all()


def test_classes_and_pool_may_be_permuted() -> None:
    pool, labelled = simplex(30), simplex(3, seed=1)
    expected = probability_coreset(pool, labelled, 8)[0].tolist()
    classes = torch.tensor([2, 0, 3, 1])
    assert probability_coreset(pool[:, classes], labelled[:, classes], 8)[0].tolist() == expected
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    again = order[probability_coreset(pool[order], labelled, 8)[0]].tolist()
    assert again == expected


def test_a_copy_of_a_labelled_sample_comes_last() -> None:
    pool, labelled = simplex(10), simplex(3, seed=1)
    pool[4] = labelled[1]
    assert probability_coreset(pool, labelled, 10)[0][-1] == 4


def test_centres_are_predictions_not_labels() -> None:
    # A sample of class 0 that the student is sure is of class 2.
    predicted, label = torch.tensor([[0.02, 0.03, 0.95]]), torch.tensor([[1.0, 0, 0]])
    assert probability_coreset(POOL, predicted, 4)[0].tolist()[0] == 0
    assert probability_coreset(POOL, label, 4)[0].tolist()[0] == 2


def test_ties_go_to_the_first() -> None:
    pool = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 1, 0]])
    rows, radii = farthest_first(pool, LABELLED, 3, euclidean_to(pool))
    assert rows.tolist() == [0, 1, 2] and radii[-1] == 0


def test_without_centres_the_first_row_begins() -> None:
    rows, radii = farthest_first(POOL, [], 2, euclidean_to(POOL))
    assert rows.tolist() == [0, 2] and radii[0] == torch.inf


def test_cosine_distance() -> None:
    pool = torch.tensor([[2.0, 0], [0, 3], [-1, 0], [0, 0]])
    assert cosine_to(pool)(torch.tensor([5.0, 0])).tolist() == pytest.approx([0, 1, 2, 1])


def test_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="cannot choose 5 of 4 samples"):
        probability_coreset(POOL, LABELLED, 5)
