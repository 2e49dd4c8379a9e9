"""Soft masks on an inner feature of a frozen network, each a function of that feature.

Li et al., ACM Multimedia 2025 (arXiv 2507.07015): a small network reads a feature of a teacher and
gives a factor in (0, 1) for each channel; the teacher goes on with the masked feature. A teacher
with such a mask is a specialised teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.inputs import call_network
from kdrun.layers.taps import replace, tap_points


class MaskNet(nn.Module):
    """A feature ``(B, D)`` or ``(B, D, H, W)`` to a mask ``(B, D)`` in (0, 1).

    A map is first pooled: depthwise 3x3 convolution of stride 2, 1x1 convolution, batch
    normalisation, ReLU, mean over positions. Each of the D channels becomes a token of width
    ``floor(D / (reduction * heads)) * heads``; self-attention among the channels and a linear layer
    give the logits of the mask. The layer that makes tokens has D * D / reduction * D weights, so
    wide features ask for a larger ``reduction``.

    Args:
        shape: of one feature, ``(D,)`` or ``(D, H, W)``; ``(D, 1, 1)`` counts as a vector.
        heads: of the attention.
        reduction: D over the width of the tokens.

    Raises:
        ValueError: the feature is too narrow for tokens of at least ``heads`` numbers.
    """

    def __init__(self, shape: tuple[int, ...], heads: int = 3, reduction: int = 2) -> None:
        super().__init__()
        channels = shape[0]
        self.width = channels // (reduction * heads) * heads
        if self.width == 0:
            raise ValueError(
                f"a feature of {channels} channels is too narrow for {heads} heads and a "
                f"reduction of {reduction}; choose another layer or lower them"
            )
        self.pool: nn.Module | None = None
        if len(shape) == 3 and shape[1:] != (1, 1):
            self.pool = nn.Sequential(
                nn.Conv2d(channels, channels, 3, 2, padding=1, groups=channels, bias=False),
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
            )
        self.tokens = nn.Linear(channels, channels * self.width)
        self.attention = nn.MultiheadAttention(self.width, heads, batch_first=True)
        self.score = nn.Linear(self.width, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """The mask ``(B, D)``."""
        vector = (feature if self.pool is None else self.pool(feature)).flatten(1)
        tokens = self.tokens(vector).unflatten(1, (vector.shape[1], self.width))
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return torch.sigmoid(self.score(attended).squeeze(-1))


def masked(feature: Tensor, mask: Tensor) -> Tensor:
    """Every channel of a feature ``(B, D, ...)`` times its entry of a mask ``(B, D)``."""
    return feature * mask.reshape(*mask.shape, *([1] * (feature.ndim - 2)))


class SpecialisedTeacher(nn.Module):
    """A frozen teacher whose inner features are masked on their way.

    The masks are its parameters. The teacher itself is not a sub-module, so it is neither trained,
    nor saved, nor put into training mode with them, and several may share one; it does follow them
    to their device. The masks act during this module's own forward pass and leave no hook behind.

    Args:
        teacher: the network, which is frozen.
        masks: mask networks by location: the path of a sub-module, or ``input:<path>``.
    """

    def __init__(self, teacher: nn.Module, masks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self.locations = tuple(masks)
        self.masks = nn.ModuleList(masks.values())

    @property
    def teacher(self) -> nn.Module:
        """The network without its masks."""
        return self._teacher[0]

    @property
    def mask(self) -> nn.Module:
        """The last of its masks, which is its own."""
        return self.masks[-1]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the teacher gives with all masks in place; arguments are the teacher's."""
        with ExitStack() as stack:
            for location, mask in zip(self.locations, self.masks, strict=True):
                stack.enter_context(replace(self.teacher, location, _applying(mask)))
            return self.teacher(*inputs, **named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpecialisedTeacher:
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)


def _applying(mask: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda feature: masked(feature, mask(feature))


def deepest_layers(network: nn.Module, count: int, sample: Any) -> list[str]:
    """Locations of the last ``count`` stages of a network, before their rectifier, shallow to deep.

    Raises:
        ValueError: it has fewer stages.
    """
    points = tap_points(network, sample)
    stages = sorted(
        (name for name in points if name.startswith("stage") and name[5:].isdigit()),
        key=lambda name: int(name[5:]),
    )
    if len(stages) < count:
        raise ValueError(f"{type(network).__name__} has {len(stages)} stages, fewer than {count}")
    return [points.get(f"{name}.preactivation", points[name]) for name in stages[-count:]]


@torch.no_grad()
def feature_shapes(
    network: nn.Module, locations: Sequence[str], sample: Any
) -> list[tuple[int, ...]]:
    """The shape of one sample's feature at each location, found by one forward pass.

    Args:
        network: in any mode; it is run in evaluation mode.
        locations: paths of sub-modules, or ``input:<path>``.
        sample: a batch of inputs.

    Raises:
        ValueError: no such sub-module.
    """
    found: dict[str, tuple[int, ...]] = {}

    def note(location: str) -> Callable[[Tensor], Tensor]:
        def keep(feature: Tensor) -> Tensor:
            found[location] = tuple(feature.shape[1:])
            return feature

        return keep

    was_training = network.training
    network.eval()
    with ExitStack() as stack:
        for location in locations:
            stack.enter_context(replace(network, location, note(location)))
        call_network(network, sample)
    network.train(was_training)
    return [found[location] for location in locations]


def specialised(
    teacher: nn.Module, locations: Sequence[str], sample: Any, *, heads: int, reduction: int
) -> list[SpecialisedTeacher]:
    """A specialised teacher for each location, with a fresh mask there and nowhere else.

    Args:
        teacher: shared by all of them.
        locations: paths of sub-modules, or ``input:<path>``.
        sample: a batch of inputs.
        heads: see ``MaskNet``.
        reduction: see ``MaskNet``.

    Raises:
        ValueError: no such sub-module, or a feature is too narrow.
    """
    shapes = feature_shapes(teacher, locations, sample)
    return [
        SpecialisedTeacher(teacher, {location: MaskNet(shape, heads, reduction)})
        for location, shape in zip(locations, shapes, strict=True)
    ]


def accumulated(specialists: Sequence[SpecialisedTeacher]) -> list[SpecialisedTeacher]:
    """Specialised teachers of one network, each with the masks of those before it as well."""
    masks = {s.locations[-1]: s.mask for s in specialists}
    locations = list(masks)
    return [
        SpecialisedTeacher(s.teacher, {at: masks[at] for at in locations[: number + 1]})
        for number, s in enumerate(specialists)
    ]
