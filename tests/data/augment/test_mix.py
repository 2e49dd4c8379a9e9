from __future__ import annotations

import pytest
import torch

from kdrun.data.augment import Mix
from kdrun.outputs import Batch


def batch(size: int = 6) -> Batch:
    """``size`` samples after the one that is only a partner; inputs tell who is who."""
    number = torch.arange(size + 1)
    inputs = number.float().view(-1, 1, 1, 1).expand(-1, 2, 8, 8).contiguous()
    return Batch(inputs, number % 3, number + 10)


def test_mixup_mixes_inputs_and_targets_alike():
    mixed = Mix(mixup=0.5)(batch(), 3, 1, 2)
    share = 1 - (torch.arange(1, 7) - mixed.inputs[:, 0, 0, 0])  # neighbours differ by one
    assert torch.allclose(share, share[0].expand(6), atol=1e-5) and 0 < share[0] < 1
    one_hot = torch.eye(3)[torch.arange(7) % 3]
    expected = share[0] * one_hot[1:] + (1 - share[0]) * one_hot[:-1]
    assert torch.allclose(mixed.target, expected, atol=1e-5)
    assert mixed.index.tolist() == list(range(11, 17))


def test_cutmix_pastes_a_box_and_counts_its_area():
    for number in range(20):
        mixed = Mix(cutmix=1.0)(batch(), 3, number)
        pasted = mixed.inputs[0, 0] == 0  # of the partner of the first
        rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
        assert pasted.sum() == rows * columns
        share = 1 - pasted.float().mean()
        assert torch.allclose(mixed.target[0, 1], share)
        assert torch.equal(
            mixed.inputs == torch.arange(1, 7).view(-1, 1, 1, 1), ~pasted.expand(6, 2, 8, 8)
        )


def test_first_keeps_the_class():
    mixed = Mix(mixup=1.0, target="first")(batch(), 3, 4)
    assert torch.equal(mixed.target, torch.arange(1, 7) % 3)


def test_probability_and_choice():
    def kind(mix: Mix, number: int) -> str:
        mixed = mix(batch(), 3, number)
        if torch.equal(mixed.inputs, batch().inputs[1:]):
            return "none"
        return "cutmix" if (mixed.inputs == mixed.inputs.round()).all() else "mixup"

    both = [kind(Mix(mixup=1.0, cutmix=1.0, probability=0.5), number) for number in range(200)]
    assert abs(both.count("mixup") - 50) < 25 and abs(both.count("cutmix") - 50) < 30
    assert not Mix(mixup=1.0, probability=0.0).mixes


def test_shares_follow_the_beta_distribution():
    def share(number: int) -> float:
        return float(1 - (1 - Mix(mixup=2.0)(batch(1), 3, number).inputs[0, 0, 0, 0]))

    shares = torch.tensor([share(number) for number in range(2_000)])
    assert abs(shares.mean() - 0.5) < 0.02  # Beta(2, 2): mean 1/2, variance 1/20
    assert abs(shares.var() - 0.05) < 0.005


def test_soft_targets_where_a_batch_is_not_mixed_are_one_hot():
    plain = Mix(mixup=1.0, probability=0.001)(batch(), 3, 0)
    assert torch.equal(plain.target, torch.eye(3)[torch.arange(1, 7) % 3])


def test_negative_parameters_are_refused():
    with pytest.raises(ValueError, match="mixup must be number >= 0"):
        Mix(mixup=-1.0)
