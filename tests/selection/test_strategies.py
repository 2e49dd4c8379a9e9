"""The strategies that farthest-first selection is compared with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kdrun.selection.strategies import (
    at_random,
    badge,
    badge_kmeanspp,
    class_balanced,
    entropy,
    feature_coreset,
    most_uncertain,
)


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def simplex(rows: int, classes: int = 4, seed: int = 0) -> Tensor:
    return (2 * torch.randn(rows, classes, generator=generator(seed))).softmax(-1)


def features(rows: int, width: int = 6, seed: int = 9) -> Tensor:
    return torch.randn(rows, width, generator=generator(seed))


def test_entropy_by_hand() -> None:
    q = torch.tensor([[0.5, 0.5, 0], [1, 0, 0]])
    assert entropy(q).tolist() == pytest.approx([math.log(2), 0], abs=1e-6)


def test_the_most_uncertain_come_first() -> None:
    q = torch.tensor([[1.0, 0, 0], [0.4, 0.3, 0.3], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    assert most_uncertain(q, 4).tolist() == [1, 2, 3, 0]


def test_at_random_is_seeded_and_distinct() -> None:
    rows = at_random(20, 12, generator())
    assert rows.tolist() == at_random(20, 12, generator()).tolist()
    assert len(set(rows.tolist())) == 12 and rows.tolist() != list(range(12))


def test_feature_coreset_reads_directions() -> None:
    pool = torch.tensor([[9.0, 0.1], [0, 1], [1, 1]])
    rows, radii = feature_coreset(pool, torch.tensor([[1.0, 0]]), 3)
    assert rows.tolist() == [1, 2, 0]
    assert radii.tolist() == pytest.approx([1, 1 - 0.5**0.5, 1 - 9 / (81.01**0.5)], abs=1e-5)


def embeddings(q: Tensor, z: Tensor) -> Tensor:
    errors = F.one_hot(q.argmax(-1), q.shape[1]) - q
    return (errors[:, :, None] * z[:, None, :]).flatten(1)


def test_badge_is_that_of_the_embeddings_themselves() -> None:
    q, z = simplex(15), features(15)
    unit = F.normalize(embeddings(q, z), dim=-1)
    chosen = [0]
    while len(chosen) < 6:
        nearest = (1 - unit @ unit[chosen].T).amin(dim=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    assert badge(q, z, 6).tolist() == chosen
    assert badge(q, z, 0).tolist() == []
    assert badge(q, z, 1).tolist() == [0]


def test_badge_of_a_certain_sample_is_the_zero_vector() -> None:
    q, z = simplex(5), features(5)
    q[0] = torch.tensor([0, 1.0, 0, 0])
    assert embeddings(q, z)[0].abs().max() == 0
    rows = badge(q, z, 5)
    assert rows[0] == 1 and sorted(rows.tolist()) == list(range(5))


def test_badge_sampling_begins_with_the_longest_and_prefers_the_far() -> None:
    q, z = simplex(12), features(12)
    e = embeddings(q, z)
    rows = badge_kmeanspp(q, z, 12, generator())
    assert rows[0] == e.norm(dim=1).argmax()
    assert sorted(rows.tolist()) == list(range(12))
    # Two clusters far apart: the second choice is of the other one, nearly always.
    z = torch.cat([features(6) * 0.01 + 5, features(6) * 0.01 - 5])
    q = simplex(1).repeat(12, 1)
    second = [int(badge_kmeanspp(q, z, 2, generator(seed))[1]) for seed in range(20)]
    first = int(badge_kmeanspp(q, z, 1, generator())[0])
    assert sum((row < 6) != (first < 6) for row in second) >= 19


def test_badge_sampling_with_copies_only() -> None:
    q, z = simplex(1).repeat(4, 1), features(1).repeat(4, 1)
    assert sorted(badge_kmeanspp(q, z, 4, generator()).tolist()) == [0, 1, 2, 3]


def sure(*classes: int) -> Tensor:
    return F.one_hot(torch.tensor(classes), 3).float()


def test_class_balanced_prefers_classes_with_few_labels() -> None:
    pool = sure(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
    target = torch.tensor([0] * 9 + [1])
    # Weights 10/10, 10/2, 10/2 (none counts as one): shares of 5 are .45, 2.27, 2.27.
    rows = class_balanced(pool, target, 5, generator())
    counts = torch.bincount(pool[rows].argmax(1), minlength=3).tolist()
    assert counts == [0, 3, 2]
    assert len(set(rows.tolist())) == 5


def test_class_balanced_fills_up_where_a_class_runs_out() -> None:
    pool, target = sure(0, 0, 0, 1), torch.tensor([0, 0, 0, 0])
    rows = class_balanced(pool, target, 3, generator())
    assert len(set(rows.tolist())) == 3 and 3 in rows.tolist()


def test_more_than_there_is() -> None:
    q = simplex(3)
    for choose in (
        lambda: at_random(3, 4, generator()),
        lambda: most_uncertain(q, 4),
        lambda: badge(q, features(3), 4),
        lambda: badge_kmeanspp(q, features(3), 4, generator()),
        lambda: class_balanced(q, torch.tensor([0]), 4, generator()),
    ):
        with pytest.raises(ValueError, match="cannot choose 4 of 3 samples"):
            choose()
