"""Strategies of pool-based active learning: which rows of a pool get a label next.

Letters: N rows in the pool, M labelled rows, C classes, D features.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kdrun.selection.farthest import (
    check_count,
    cosine_to,
    euclidean_to,
    farthest_first,
)

SMALL = 1e-10
"""Added to probabilities before their logarithm."""


def probability_coreset(pool: Tensor, labelled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """PCoreSet: farthest-first in the space of predicted probabilities.

    Kang et al., arXiv 2506.00910, algorithm 1. The centres to begin with are the predictions on the
    labelled samples, not their labels.

    Args:
        pool: predicted probabilities ``(N, C)``.
        labelled: predicted probabilities ``(M, C)``.
        count: rows to choose.

    Returns:
        The rows, and each one's distance from the nearest centre when it was chosen.
    """
    return farthest_first(pool, labelled, count, euclidean_to(pool))


def feature_coreset(pool: Tensor, labelled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """CoreSet: farthest-first by the cosine between penultimate features.

    Sener and Savarese, ICLR 2018, in the cosine distance that Kang et al. use.

    Args:
        pool: features ``(N, D)``.
        labelled: features ``(M, D)``.
        count: rows to choose.

    Returns:
        The rows, and each one's distance from the nearest centre when it was chosen.
    """
    return farthest_first(pool, labelled, count, cosine_to(pool))


def at_random(size: int, count: int, generator: Generator) -> Tensor:
    """Rows of a pool of ``size`` at random, each at most once."""
    check_count(count, size)
    return torch.randperm(size, generator=generator)[:count]


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row ``(N, C)``: ``-sum q log(q + 1e-10)``."""
    return -(probabilities * (probabilities + SMALL).log()).sum(dim=-1)


def most_uncertain(pool: Tensor, count: int) -> Tensor:
    """The rows of largest entropy; ``pool`` holds probabilities ``(N, C)``."""
    check_count(count, len(pool))
    return entropy(pool).argsort(descending=True, stable=True)[:count]


def badge(pool: Tensor, features: Tensor, count: int) -> Tensor:
    """BADGE as Kang et al. code it: farthest-first, from the longest row, without sampling.

    The embedding of a row is ``(onehot(argmax q) - q) x features``, the gradient at the last layer
    if the predicted class were the true one, made a unit vector; distance is 1 - cos. All unit
    vectors are equally long, so the first row is the first whose embedding is not zero. Embeddings
    are never formed: the cosine of two products is the product of the cosines.

    Args:
        pool: probabilities ``(N, C)``.
        features: penultimate ``(N, D)``.
        count: rows to choose.
    """
    check_count(count, len(pool))
    errors = F.normalize(_errors(pool), dim=-1)
    directions = F.normalize(features.float(), dim=-1)
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    lengths = (errors.norm(dim=-1) * directions.norm(dim=-1)).round()
    both = torch.cat([errors, directions], dim=-1)
    classes = errors.shape[1]

    def distance(point: Tensor) -> Tensor:
        return 1 - (errors @ point[:classes]) * (directions @ point[classes:])

    first = int(lengths.argmax())
    others = torch.cat([torch.arange(first), torch.arange(first + 1, len(both))])
    rest, _ = farthest_first(
        both[others], [both[first]], count - 1, lambda point: distance(point)[others]
    )
    return torch.cat([torch.tensor([first]), others[rest]])


def badge_kmeanspp(pool: Tensor, features: Tensor, count: int, generator: Generator) -> Tensor:
    """BADGE as published: k-means++ seeding of gradient embeddings.

    Ash et al., ICLR 2020, algorithm 1: the first row is the longest embedding; each further one is
    drawn with a probability proportional to its squared distance from the nearest chosen row.

    Args:
        pool: probabilities ``(N, C)``.
        features: penultimate ``(N, D)``.
        count: rows to choose.
        generator: of the draws.
    """
    check_count(count, len(pool))
    errors, features = _errors(pool), features.float()
    squared = errors.square().sum(dim=-1) * features.square().sum(dim=-1)

    def squared_distance(row: int) -> Tensor:
        products = (errors @ errors[row]) * (features @ features[row])
        return (squared + squared[row] - 2 * products).clamp(min=0)

    chosen: list[int] = []
    nearest = squared
    for _ in range(count):
        if not chosen:
            row = int(squared.argmax())
            nearest = squared_distance(row)
        else:
            weights = nearest.clone()
            weights[chosen] = 0
            if not weights.sum() > 0:  # Only copies of chosen rows are left.
                weights = torch.ones_like(weights)
                weights[chosen] = 0
            row = int(torch.multinomial(weights, 1, generator=generator))
            nearest = torch.minimum(nearest, squared_distance(row))
        chosen.append(row)
    return torch.tensor(chosen, dtype=torch.int64)


def _errors(pool: Tensor) -> Tensor:
    """``onehot(argmax q) - q``, ``(N, C)``."""
    pool = pool.float()
    return F.one_hot(pool.argmax(dim=-1), pool.shape[1]) - pool


def class_balanced(pool: Tensor, target: Tensor, count: int, generator: Generator) -> Tensor:
    """Rows predicted as classes that have few labels, at random within a class.

    The weight of a predicted class is ``M / (n + 1)`` with n its labelled samples, 1 where it has
    none, over the sum for all predicted classes. A class gives the whole part of its share of
    ``count``; what is left goes one by one to the largest weights, and what a class cannot give is
    taken from the rest of the pool at random.

    Args:
        pool: probabilities ``(N, C)``.
        target: classes of the labelled samples ``(M,)``.
        count: rows to choose.
        generator: of the draws.
    """
    check_count(count, len(pool))
    predicted = pool.argmax(dim=-1)
    present = predicted.unique()
    labelled = torch.bincount(target, minlength=pool.shape[1])[present].clamp(min=1)
    weights = len(target) / (labelled.double() + 1)
    weights = weights / weights.sum()
    shares = (count * weights).floor().long()
    order = weights.argsort(descending=True, stable=True)
    left = count - int(shares.sum())
    shares += left // len(present)
    shares[order[: left % len(present)]] += 1
    chosen = []
    for number, share in zip(present.tolist(), shares.tolist(), strict=True):
        rows = (predicted == number).nonzero().flatten()
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:share]])
    rows = torch.cat(chosen)
    rest = torch.ones(len(pool), dtype=torch.bool)
    rest[rows] = False
    others = rest.nonzero().flatten()
    others = others[torch.randperm(len(others), generator=generator)]
    return torch.cat([rows, others])[:count]
