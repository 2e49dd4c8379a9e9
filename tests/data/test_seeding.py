from __future__ import annotations

import itertools

import torch

from kdrun.data.seeding import stream, stream_seed


def test_neighbouring_words_give_unrelated_seeds():
    words = list(itertools.product(range(8), range(8), range(8)))
    seeds = torch.tensor([stream_seed(*word) & 0xFFFFFFFF for word in words])
    assert len(set(seeds.tolist())) == len(words)
    bits = (seeds[:, None] >> torch.arange(32)) & 1
    assert ((bits.float().mean(0) - 0.5).abs() < 0.12).all()  # 5 sigma of 512 fair coins


def test_order_and_number_of_words_matter():
    assert len({stream_seed(1, 2), stream_seed(2, 1), stream_seed(1, 2, 0), stream_seed(1)}) == 4


def test_a_stream_starts_at_the_same_place_each_time():
    first = torch.rand(5, generator=stream(3, 1, 4))
    torch.rand(7)  # the global generator has no say
    assert torch.equal(first, torch.rand(5, generator=stream(3, 1, 4)))
