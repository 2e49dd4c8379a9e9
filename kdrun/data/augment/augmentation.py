"""The random changes made to training images, in a fixed order, as one set of typed options."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from kdrun.data.augment.geometry import crop_flip, cutout
from kdrun.data.augment.jitter import apply_jitter, draw_jitter
from kdrun.data.augment.policy import POLICIES, apply_policy, draw_policy
from kdrun.parameters import (
    Fraction,
    Interval,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    checked_constructor,
)

Draws = dict[str, Tensor]
"""The random parameters of an augmentation: name to a tensor with one row per sample."""


class Augmentation:
    """Crop, flip, policy, colour jitter and cutout, in this order; everything is off by default.

    Works on whole uint8 batches before normalisation. Parameters are drawn on the CPU and the
    pixels are computed without rounding differences, so a seed gives the same images on any device.

    Args:
        crop_padding: pixels of zeros added on each side before a window of the original size is
            cut at a random place.
        flip: probability of mirroring left to right.
        policy: ``randaugment`` (one strength for all operations), ``trivialaugment`` (random
            strengths in wide ranges; one round) or ``fixmatch`` (random strengths in the ranges of
            FixMatch's strong view).
        policy_rounds: operations per image, one after the other.
        policy_magnitude: strength of ``randaugment``, 0 to 30.
        brightness: factors are uniform in [1 - x, 1 + x]; likewise contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: greatest turn of the hue circle, in turns.
        cutout: side in pixels of a square that is overwritten.
        cutout_side: ``fixed``, or ``uniform`` between 0 and ``cutout`` for every image.
        cutout_fill: the value written, 0 black to 255 white.
    """

    @checked_constructor
    def __init__(
        self,
        *,
        crop_padding: NonNegativeInt = 0,
        flip: Fraction = 0.0,
        policy: Literal["none", "randaugment", "trivialaugment", "fixmatch"] = "none",
        policy_rounds: PositiveInt = 2,
        policy_magnitude: Annotated[int, Interval(low=0, high=30)] = 9,
        brightness: NonNegative = 0.0,
        contrast: NonNegative = 0.0,
        saturation: NonNegative = 0.0,
        hue: Annotated[float, Interval(low=0, high=0.5)] = 0.0,
        cutout: NonNegativeInt = 0,
        cutout_side: Literal["fixed", "uniform"] = "fixed",
        cutout_fill: Annotated[int, Interval(low=0, high=255)] = 0,
    ) -> None:
        if policy == "trivialaugment" and policy_rounds != 1:
            raise ValueError("trivialaugment is one operation per image: set policy_rounds=1")
        self.crop_padding, self.flip = crop_padding, flip
        self.policy, self.policy_rounds = policy, policy_rounds
        self.policy_magnitude = policy_magnitude
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.hue = hue
        self.cutout, self.cutout_side, self.cutout_fill = cutout, cutout_side, cutout_fill

    @property
    def jitters(self) -> bool:
        """Whether any colour jitter is on."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    @property
    def changes_images(self) -> bool:
        """Whether anything is on."""
        geometry = self.crop_padding or self.flip or self.cutout
        return bool(geometry or self.jitters or self.policy != "none")

    def draw(self, count: int, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Parameters for ``count`` images of the given ``(C, H, W)``, on the CPU."""
        draws: Draws = {}
        if self.crop_padding or self.flip:
            places = 2 * self.crop_padding + 1
            draws["top"], draws["left"] = torch.randint(places, (2, count), generator=generator)
            draws["mirror"] = torch.rand(count, generator=generator) < self.flip
        if self.policy != "none":
            draws |= draw_policy(
                POLICIES[self.policy],
                count,
                shape,
                generator,
                rounds=self.policy_rounds,
                magnitude=self.policy_magnitude if self.policy == "randaugment" else None,
            )
        if self.jitters:
            draws |= draw_jitter(
                count,
                generator,
                brightness=self.brightness,
                contrast=self.contrast,
                saturation=self.saturation,
                hue=self.hue,
            )
        if self.cutout:
            draws["row"] = torch.randint(shape[1], (count,), generator=generator)
            draws["column"] = torch.randint(shape[2], (count,), generator=generator)
            draws["side"] = torch.full((count,), self.cutout)
            if self.cutout_side == "uniform":
                draws["side"] = torch.randint(self.cutout + 1, (count,), generator=generator)
        return draws

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Change ``(B, C, H, W)`` uint8 images by the draws of the same ``B`` samples."""
        if "mirror" in draws:
            images = crop_flip(
                images, draws["top"], draws["left"], draws["mirror"], padding=self.crop_padding
            )
        if "operation" in draws:
            images = apply_policy(images, draws)
        if "jitter_order" in draws:
            images = apply_jitter(images, draws)
        if "side" in draws:
            place = draws["row"], draws["column"]
            images = cutout(images, *place, side=draws["side"], fill=self.cutout_fill)
        return images

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"Augmentation({options})"
