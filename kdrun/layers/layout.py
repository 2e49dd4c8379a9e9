"""How networks lay out image features, and the two forms in which methods read them.

Convolutional networks give maps ``(B, C, H, W)``, some hierarchical transformers give maps with
channels last ``(B, H, W, C)``, and plain transformers and MLP-mixers give tokens ``(B, L, D)``,
with special tokens (class, distillation, registers) in front of the patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """How one network lays out its stage features.

    Attributes:
        special_tokens: tokens in front of the patch tokens that belong to no image position;
            features whose tokens form a square without them are taken to have none (networks that
            add the class token late).
        channels_last: 4-d features are ``(B, H, W, C)``.
    """

    special_tokens: int = 0
    channels_last: bool = False

    def grid(self, feature: Tensor) -> tuple[int, int]:
        """The spatial size ``(H, W)`` of a feature of this layout.

        Raises:
            ValueError: the feature has no spatial positions, or its tokens form no square.
        """
        if feature.ndim == 4:
            height, width = feature.shape[1:3] if self.channels_last else feature.shape[2:4]
            return int(height), int(width)
        patches = feature.shape[1] - self.special_tokens_of(feature)
        return math.isqrt(patches), math.isqrt(patches)

    def special_tokens_of(self, feature: Tensor) -> int:
        """How many tokens of ``(B, L, D)`` are special.

        Raises:
            ValueError: it is no token feature, or its tokens form no square.
        """
        for special in (self.special_tokens, 0):
            patches = feature.shape[1] - special if feature.ndim == 3 else 0
            if patches > 0 and math.isqrt(patches) ** 2 == patches:
                return special
        raise ValueError(
            f"a feature of shape {tuple(feature.shape)} with {self.special_tokens} special tokens "
            "has no square grid of positions; ask for <tap>.tokens or <tap>.raw"
        )


def as_map(feature: Tensor, layout: Layout) -> Tensor:
    """A stage feature as a map ``(B, C, H, W)``; special tokens are left out.

    A view where the memory allows; gradients flow.

    Raises:
        ValueError: the feature has no spatial positions, or its tokens form no square.
    """
    height, width = layout.grid(feature)
    if feature.ndim == 3:
        patches = feature[:, layout.special_tokens_of(feature) :]
        return patches.transpose(1, 2).unflatten(2, (height, width))
    return feature.permute(0, 3, 1, 2) if layout.channels_last else feature


def as_tokens(feature: Tensor, layout: Layout, special: Tensor | None = None) -> Tensor:
    """A stage feature as tokens ``(B, L, D)`` in row-major order of the positions.

    Tokens keep their special tokens in front; a map has none to keep.

    Args:
        feature: map or tokens as the network gives it.
        layout: its layout.
        special: tokens ``(B, S, D)`` to put in front of those of a map, which undoes ``as_map``.
    """
    if feature.ndim == 3:
        return feature
    layout.grid(feature)
    tokens = feature.flatten(1, 2) if layout.channels_last else feature.flatten(2).transpose(1, 2)
    return tokens if special is None else torch.cat([special, tokens], dim=1)
