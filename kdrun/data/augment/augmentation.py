"""The random changes made to training images, in a fixed order, as one set of typed options."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrun.data.augment.geometry import crop_flip
from kdrun.parameters import Fraction, NonNegativeInt, checked_constructor

Draws = dict[str, Tensor]
"""The random parameters of an augmentation: name to a tensor with one row per sample."""


class Augmentation:
    """Crop, then flip.

    Args:
        crop_padding: pixels of zeros added on each side before a window of the original size is
            cut at a random place; 0 switches it off.
        flip: probability of mirroring left to right.
    """

    @checked_constructor
    def __init__(self, *, crop_padding: NonNegativeInt = 0, flip: Fraction = 0.0) -> None:
        self.crop_padding = crop_padding
        self.flip = flip

    @property
    def changes_images(self) -> bool:
        """Whether anything is switched on."""
        return bool(self.crop_padding or self.flip)

    def draw(self, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Parameters for ``count`` samples of the given ``(C, H, W)``, on the CPU."""
        draws: Draws = {}
        if self.crop_padding or self.flip:
            places = 2 * self.crop_padding + 1
            draws["top"], draws["left"] = torch.randint(places, (2, count), generator=generator)
            draws["mirror"] = torch.rand(count, generator=generator) < self.flip
        return draws

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Change ``(B, C, H, W)`` images by the parameters of the same ``B`` samples."""
        if "mirror" in draws:
            images = crop_flip(
                images, draws["top"], draws["left"], draws["mirror"], padding=self.crop_padding
            )
        return images

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"Augmentation({options})"
