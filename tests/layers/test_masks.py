"""Masks in frozen networks: what they compute, and that nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdrun.layers.masks import (
    MaskNet,
    SpecialisedTeacher,
    accumulated,
    deepest_layers,
    feature_shapes,
    masked,
    specialised,
)
from kdrun.models.av_mnist import AVFusion, LeNet5, SpectrogramCNN
from tests.tiny import identical, mlp, small_cnn, state_of

SAMPLE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Constant(nn.Module):
    """A mask of one value everywhere."""

    def __init__(self, value: float, channels: int) -> None:
        super().__init__()
        self.value, self.channels = value, channels

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return torch.full((len(feature), self.channels), self.value)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [((596,), 105_676_164), ((320,), 16_300_000), ((64,), 124_800)],
)
def test_the_layer_that_makes_tokens_is_the_large_one(shape, parameters: int) -> None:
    with torch.device("meta"):
        net = MaskNet(shape)
    count = sum(parameter.numel() for parameter in net.tokens.parameters())
    assert count == pytest.approx(parameters, rel=0.01)
    assert net.width % 3 == 0 and net.width <= shape[0] / 2


@pytest.mark.parametrize("shape", [(12,), (12, 1, 1), (12, 5, 7)])
def test_a_mask_is_a_factor_for_each_channel(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = MaskNet(shape)
    assert (net.pool is None) == (shape != (12, 5, 7))
    feature = torch.randn(3, *shape)
    mask = net(feature)
    assert mask.shape == (3, 12) and mask.min() > 0 and mask.max() < 1
    assert masked(feature, mask).shape == feature.shape
    assert torch.equal(masked(feature, torch.ones(3, 12)), feature)
    assert torch.allclose(
        masked(feature, mask)[:, 4], feature[:, 4] * mask[:, 4].view(3, *([1] * (len(shape) - 1)))
    )


def test_the_mask_by_hand() -> None:
    torch.manual_seed(0)
    net = MaskNet((6,), heads=3, reduction=2).double()
    feature = torch.randn(1, 6, dtype=torch.float64)
    tokens = (net.tokens.weight @ feature[0] + net.tokens.bias).reshape(6, 3)
    weights, bias = net.attention.in_proj_weight, net.attention.in_proj_bias
    query, key, value = (
        (tokens @ w.T + b) for w, b in zip(weights.chunk(3), bias.chunk(3), strict=True)
    )
    heads = []
    for h in range(3):  # Heads of width 1: nothing to scale by.
        scores = torch.softmax(query[:, h : h + 1] @ key[:, h : h + 1].T, -1)
        heads.append(scores @ value[:, h : h + 1])
    attended = net.attention.out_proj(torch.cat(heads, 1))
    expected = torch.sigmoid(net.score(attended))[:, 0]
    assert torch.allclose(net(feature)[0], expected)


def test_a_feature_too_narrow_for_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="5 channels is too narrow for 3 heads"):
        MaskNet((5,))


def test_a_mask_of_ones_is_the_plain_teacher_and_no_hook_stays() -> None:
    teacher = small_cnn(0)
    before, hooks = teacher.eval()(SAMPLE), hooks_of(teacher)
    one = SpecialisedTeacher(teacher, {"stages.1": Constant(1.0, 8)})
    half = SpecialisedTeacher(teacher, {"stages.1": Constant(0.5, 8)})
    assert torch.equal(one(SAMPLE), before)
    assert not torch.equal(half(SAMPLE), before)
    assert torch.equal(teacher(SAMPLE), before) and hooks_of(teacher) == hooks


def hooks_of(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_the_teacher_is_neither_trained_nor_saved_with_its_mask() -> None:
    teacher = small_cnn(0)
    state = copy.deepcopy(state_of(teacher))
    (specialist,) = specialised(teacher, ["stages.2"], SAMPLE, heads=3, reduction=1)
    specialist.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(name.startswith("masks.0.") for name in specialist.state_dict())
    optimizer = torch.optim.Adam(specialist.parameters(), 0.1)
    specialist(SAMPLE).square().mean().backward()
    optimizer.step()
    assert identical(state_of(teacher), state)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in specialist.parameters())


def test_it_takes_its_teacher_along() -> None:
    teacher = mlp(0)
    (specialist,) = specialised(teacher, ["classifier"], SAMPLE, heads=3, reduction=1)
    specialist.double()
    assert teacher.classifier.weight.dtype is torch.float64


def test_masks_add_up_only_where_that_is_asked_for() -> None:
    teacher = mlp(0, 12, 12).eval()
    paths = ["layers.0.0", "layers.1.0"]
    first, second = specialised(teacher, paths, SAMPLE, heads=3, reduction=2)
    alone, both = accumulated([first, second])
    assert torch.equal(alone(SAMPLE), first(SAMPLE))
    assert both.mask is second.mask and both.locations == tuple(paths)
    assert not torch.allclose(both(SAMPLE), second(SAMPLE))
    hidden = torch.relu(
        masked(
            teacher.layers[0][0](SAMPLE.flatten(1)),
            first.mask(teacher.layers[0][0](SAMPLE.flatten(1))),
        )
    )
    deep = teacher.layers[1][0](hidden)
    expected = teacher.classifier(torch.relu(masked(deep, second.mask(deep))))
    assert torch.allclose(both(SAMPLE), expected, atol=1e-6)


def test_where_masks_go_by_themselves() -> None:
    """The last layers before the classifier, before their ReLU: those of the paper's table."""
    image, audio = torch.zeros(2, 1, 28, 28), torch.zeros(2, 1, 112, 112)
    networks = {
        LeNet5(num_classes=10): (image, [(120, 1, 1), (84,)]),
        SpectrogramCNN(num_classes=10, input_shape=(1, 112, 112)): (
            audio, [(64, 56, 56), (128, 28, 28)],
        ),
        AVFusion(num_classes=10): ({"image": image, "audio": audio}, [(596,), (298,)]),
    }  # fmt: skip
    for network, (sample, shapes) in networks.items():
        found = deepest_layers(network, 2, sample)
        assert feature_shapes(network, found, sample) == shapes
    assert deepest_layers(mlp(0, 8, 9), 2, SAMPLE) == ["input:layers.0.1", "input:layers.1.1"]
    assert deepest_layers(small_cnn(0), 1, SAMPLE) == ["input:stages.2.2"]
    with pytest.raises(ValueError, match="MLP has 1 stages, fewer than 2"):
        deepest_layers(mlp(0), 2, SAMPLE)
