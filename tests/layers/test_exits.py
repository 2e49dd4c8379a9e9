from __future__ import annotations

import pytest
import torch
from torch import nn

from kdrun.layers.exits import PatchMerging, TokenExit, convolutional_exit, separable_halving


def token_exit(**changes) -> TokenExit:
    options = {"grid": 8, "special": 0, "channels": 16, "width": 16, "final_grid": 4}
    return TokenExit(**options | {"depth": 1, "classes": 5} | changes)


@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_an_exit_from_maps_halves_them(halvings: int) -> None:
    torch.manual_seed(0)
    branch = convolutional_exit(6, halvings=halvings, width=20, classes=5)
    sizes, widths = [], []
    features = torch.randn(2, 6, 16, 16)
    for layer in branch:
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            break
        features = layer(features)
        sizes.append(features.shape[-1])
        widths.append(features.shape[1])
    expected = [6 * 2**step for step in range(1, halvings)] + [20]
    assert widths == expected
    assert sizes == ([16 // 2**step for step in range(1, halvings + 1)] or [16])
    assert branch(torch.randn(2, 6, 16, 16)).shape == (2, 5)


def test_the_shallow_exit_of_no_halving_has_a_bias_and_separable_ones_have_none() -> None:
    assert convolutional_exit(6, halvings=0, width=20, classes=5)[0].bias is not None
    convolutions = [m for m in separable_halving(6, 8) if isinstance(m, nn.Conv2d)]
    assert [m.bias for m in convolutions] == [None] * 4
    assert [(m.groups, m.stride[0], m.out_channels) for m in convolutions] == [
        *((6, 2, 6), (1, 1, 6)),
        *((6, 1, 6), (1, 1, 8)),
    ]


def test_neighbours_are_joined_in_the_order_of_the_swin_transformer() -> None:
    merging = PatchMerging(4, 1, 4, nn.Identity())
    merging.norm, merging.projection = nn.Identity(), nn.Identity()
    numbers = torch.arange(16.0).view(1, 16, 1)
    joined = merging(numbers)[0].tolist()
    assert joined[0] == [0, 4, 1, 5], "upper left, lower left, upper right, lower right"
    assert joined[1] == [2, 6, 3, 7] and joined[3] == [10, 14, 11, 15]


@pytest.mark.parametrize(
    ("grid", "final_grid", "merges"), [(56, 7, 3), (28, 7, 2), (14, 7, 1), (7, 7, 0), (8, 2, 2)]
)
def test_patches_are_merged_down_to_the_final_grid(grid: int, final_grid: int, merges: int) -> None:
    branch = token_exit(grid=grid, final_grid=final_grid)
    assert len(branch.merging) == merges
    tokens = branch.merging(torch.zeros(1, grid * grid, 16))
    assert tokens.shape == (1, final_grid**2, 16)


def test_the_first_merging_ends_in_gelu_and_a_later_last_one_does_not() -> None:
    kinds = {
        grid: [type(merging.activation) for merging in token_exit(grid=grid, final_grid=7).merging]
        for grid in (14, 28, 56)
    }
    assert kinds == {
        14: [nn.GELU],
        28: [nn.GELU, nn.Identity],
        56: [nn.GELU, nn.GELU, nn.Identity],
    }


def test_special_tokens_pass_around_the_merging() -> None:
    torch.manual_seed(0)
    branch = token_exit(special=2)
    branch.blocks = nn.Identity()
    tokens = torch.randn(3, 2 + 64, 16)
    torch.testing.assert_close(branch(tokens), branch.classifier(tokens[:, 0]))
    plain = token_exit()
    plain.blocks = nn.Identity()
    expected = plain.classifier(plain.merging(tokens[:, 2:]).mean(dim=1))
    torch.testing.assert_close(plain(tokens[:, 2:]), expected)


def test_a_wider_stage_is_brought_to_the_width_by_merging() -> None:
    branch = token_exit(channels=8, width=16)
    assert branch(torch.zeros(2, 64, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 9, "final_grid": 4}, "9x9 patches cannot be halved 1 times"),
        ({"channels": 8, "special": 1}, "width 16 cannot read tokens of width 8 beside special"),
        ({"channels": 8, "final_grid": 8}, "width 16 cannot read tokens of width 8 on a grid of 8"),
        ({"channels": 6, "width": 6}, "cannot have 4 attention heads"),
    ],
)
def test_what_does_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_exit(**changes)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    branch = convolutional_exit(64, halvings=1, width=256, classes=100)
    pointwise = branch[0][1]
    assert pointwise.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert branch[-1].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert branch[-1].bias.abs().max() == 0
    tokens = token_exit(channels=64, width=64)
    attention = tokens.blocks[0].self_attn
    for weight in (attention.in_proj_weight, attention.out_proj.weight, tokens.classifier.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert attention.in_proj_bias.abs().max() == 0
