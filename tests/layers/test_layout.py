"""Maps and tokens."""

from __future__ import annotations

import pytest
import torch

from kdrun.layers.layout import Layout, as_map, as_tokens


def test_tokens_become_a_map_in_row_major_order_without_special_tokens() -> None:
    tokens = torch.arange(5.0).reshape(1, 5, 1)  # one class token, then a 2x2 grid
    assert as_map(tokens, Layout(special_tokens=1)).tolist() == [[[[1, 2], [3, 4]]]]


def test_channels_last_maps_become_channels_first() -> None:
    feature = torch.randn(2, 3, 4, 5)
    converted = as_map(feature, Layout(channels_last=True))
    assert converted.shape == (2, 5, 3, 4)
    assert torch.equal(converted[1, 2], feature[1, :, :, 2])


def test_both_kinds_of_map_give_the_same_tokens() -> None:
    channels_first = torch.randn(2, 5, 3, 4)
    channels_last = channels_first.permute(0, 2, 3, 1)
    tokens = as_tokens(channels_first, Layout())
    assert tokens.shape == (2, 12, 5)
    assert torch.equal(tokens, as_tokens(channels_last, Layout(channels_last=True)))
    assert torch.equal(tokens[0, 7], channels_first[0, :, 1, 3])


def test_tokens_and_maps_are_inverses() -> None:
    layout = Layout(special_tokens=2)
    tokens = torch.randn(2, 11, 6)
    special = tokens[:, :2]
    assert torch.equal(as_tokens(as_map(tokens, layout), layout, special), tokens)
    feature = torch.randn(2, 6, 3, 3)
    assert torch.equal(as_map(as_tokens(feature, Layout()), Layout()), feature)


def test_networks_that_add_the_class_token_late() -> None:
    layout = Layout(special_tokens=1)
    assert as_map(torch.randn(1, 16, 3), layout).shape == (1, 3, 4, 4)
    assert as_map(torch.randn(1, 17, 3), layout).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 0, 3), (2, 3)])
def test_what_has_no_square_grid_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no square grid"):
        as_map(torch.zeros(shape), Layout(special_tokens=1))


def test_gradients_flow_through_both_forms() -> None:
    tokens = torch.randn(1, 5, 2, requires_grad=True)
    as_map(tokens, Layout(special_tokens=1)).sum().backward()
    assert tokens.grad[0].tolist() == [[0, 0]] + [[1, 1]] * 4
