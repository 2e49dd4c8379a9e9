from __future__ import annotations

import pytest
import torch
from torch import nn

from kdrun.layers.dual_head import (
    CosineHead,
    DualHead,
    best_mixture,
    count_correct,
    mix_heads,
)

SUPERVISED = torch.tensor([[1.0, 0, 0]])
DISTILLED = torch.tensor([[0.0, 3, 0]])


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (0.5, 1, [0.3107, 0.5607, 0.1286]),
        (0.5, 4, [0.4095, 0.3631, 0.2274]),
        (0.8, 1, [0.4699, 0.3514, 0.1786]),
    ],
)
def test_by_hand(alpha: float, beta: float, expected: list[float]) -> None:
    mixed = mix_heads(SUPERVISED, DISTILLED, alpha=alpha, beta=beta)
    assert mixed.exp().flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert mixed.softmax(-1).flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert mixed.argmax() == (1 if (alpha, beta) == (0.5, 1) else 0)


def test_the_ends_are_the_heads_themselves() -> None:
    ours, theirs = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mix_heads(ours, theirs, alpha=1, beta=2), ours.log_softmax(-1))
    for beta in (0.5, 4.0):
        mixed = mix_heads(ours, theirs, alpha=0, beta=beta)
        torch.testing.assert_close(mixed, (theirs / beta).log_softmax(-1))
        assert torch.equal(mixed.argmax(-1), theirs.argmax(-1))


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    ours, theirs = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        mix_heads(ours + 7, theirs - 3, alpha=0.4, beta=0.5),
        mix_heads(ours, theirs, alpha=0.4, beta=0.5),
    )


def test_counts_are_those_of_every_mixture_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 50, 4, generator=generator)
    target = torch.randint(4, (50,), generator=generator)
    alphas, betas = (0.0, 0.3, 1.0), (0.5, 2.0)
    counts = count_correct(ours, theirs, target, alphas=alphas, betas=betas)
    for i, beta in enumerate(betas):
        for j, alpha in enumerate(alphas):
            mixed = mix_heads(ours, theirs, alpha=alpha, beta=beta)
            assert counts[i, j] == (mixed.argmax(-1) == target).sum()


def test_the_first_best_is_kept() -> None:
    counts = torch.tensor([[3, 5, 5], [5, 2, 5]])
    assert best_mixture(counts, alphas=(0.0, 0.5, 1.0), betas=(1.0, 2.0)) == (0.5, 1.0)


def test_a_cosine_head_scales_its_bias_too() -> None:
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        linear.bias.copy_(torch.tensor([0.5, 0.0]))
    logits = CosineHead(linear, 100.0)(torch.tensor([[3.0, 4.0]]))
    assert logits.flatten().tolist() == pytest.approx([110, 80])


def test_the_mixture_is_part_of_the_weights() -> None:
    head = DualHead(nn.Linear(3, 2), nn.Linear(3, 2), alpha=0.5, beta=1.0)
    head.set_mixture(0.8, 2.0)
    other = DualHead(nn.Linear(3, 2), nn.Linear(3, 2), alpha=0.5, beta=1.0)
    other.load_state_dict(head.state_dict())
    features = torch.randn(4, 3)
    assert torch.equal(other(features), head(features))
    expected = mix_heads(head.supervised(features), head.distilled(features), alpha=0.8, beta=2.0)
    torch.testing.assert_close(head(features), expected)
