"""Labelled and unlabelled samples through one network, one after the other or together."""

from __future__ import annotations

import torch
from torch import nn

from kdrun.forward import run_network
from kdrun.layers.taps import attach
from kdrun.outputs import Batch
from tests.tiny import small_cnn, task


def batch(samples: int, seed: int) -> Batch:
    inputs = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(inputs, torch.zeros(samples, dtype=torch.long), torch.arange(samples))


def pair() -> Batch:
    both = batch(6, 0)
    both.unlabelled = batch(10, 1)
    return both


def network() -> nn.Module:
    return small_cnn(1).train()


def test_one_after_the_other_is_as_two_forwards() -> None:
    both, net = pair(), network()
    output = run_network(task(), net, both)
    other = network()
    assert torch.equal(output.logits, other(both.inputs))
    assert torch.equal(output.unlabelled.logits, other(both.unlabelled.inputs))


def test_together_is_as_one_forward_of_both() -> None:
    both, net = pair(), network()
    taps = attach(net, ("penultimate",))
    output = run_network(task(), net, both, taps, joint=True)
    expected = network()(torch.cat([both.inputs, both.unlabelled.inputs]))
    assert torch.equal(output.logits, expected[:6])
    assert torch.equal(output.unlabelled.logits, expected[6:])
    assert output.features["penultimate"].shape[0] == 6
    assert output.unlabelled.features["penultimate"].shape[0] == 10
    apart = run_network(task(), network(), both)
    assert not torch.allclose(apart.logits, output.logits)


def test_parts_of_a_batch_keep_all_unlabelled_samples() -> None:
    both = pair()
    part = both.rows(slice(2, 4))
    assert len(part) == 2 and part.unlabelled is both.unlabelled


def test_without_unlabelled_samples_there_is_no_such_output() -> None:
    assert run_network(task(), network(), batch(4, 0), joint=True).unlabelled is None
