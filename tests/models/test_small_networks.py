"""MLP and small CNN."""

from __future__ import annotations

import pytest
import torch

from kdrun.layers.taps import attach
from kdrun.models.mlp import MLP
from kdrun.models.small_cnn import SmallCNN


def test_mlp_flattens_its_input_and_taps_its_hidden_layers() -> None:
    torch.manual_seed(0)
    network = MLP(num_classes=3, input_shape=(1, 2, 2), hidden=(5, 7))
    assert sum(p.numel() for p in network.parameters()) == (4 * 5 + 5) + (5 * 7 + 7) + (7 * 3 + 3)
    taps = attach(network, ("stages", "stages.preactivation", "penultimate"))
    with taps:
        assert network(torch.randn(6, 1, 2, 2)).shape == (6, 3)
    features = taps.collect()
    assert features["stage1"].shape == (6, 5)
    assert features["stage1.preactivation"].min() < 0 <= features["stage1"].min()
    assert torch.equal(features["stage2"], features["penultimate"])


def test_mlp_without_hidden_layers_is_logistic_regression() -> None:
    network = MLP(num_classes=3, input_shape=(4,), hidden=())
    assert [tuple(p.shape) for p in network.parameters()] == [(3, 4), (3,)]


@pytest.mark.parametrize("side", [8, 32])
def test_small_cnn_halves_the_map_in_every_stage_but_the_first(side: int) -> None:
    network = SmallCNN(num_classes=10, in_channels=1, widths=(4, 8, 16, 32))
    taps = attach(network, ("stages", "penultimate"))
    with taps:
        assert network(torch.randn(2, 1, side, side)).shape == (2, 10)
    features = taps.collect()
    assert features.pop("penultimate").shape == (2, 32)
    assert [f.shape[-1] for f in features.values()] == [side, side // 2, side // 4, side // 8]
