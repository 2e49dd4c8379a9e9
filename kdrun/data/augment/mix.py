"""Mixup and CutMix: every sample of a batch is mixed with its neighbour."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdrun.data.seeding import stream_seed
from kdrun.outputs import Batch
from kdrun.parameters import Fraction, NonNegative, checked_constructor


class Mix:
    """Mix the normalised inputs of a batch, one strength for all of it.

    The partner of a sample is the one before it in the global batch; batches are in random order,
    so partners are random. Further views are left as they are.

    - Mixup (Zhang et al., ICLR 2018): ``x = lam x_i + (1 - lam) x_j``, ``lam ~ Beta(a, a)``.
    - CutMix (Yun et al., ICCV 2019): a box with ``1 - lam`` of the area, its centre uniform, comes
      from the partner; ``lam`` is then set to the share that remains after clipping at the border.

    Args:
        mixup: the Beta parameter of mixup; 0 switches it off.
        cutmix: the Beta parameter of CutMix; 0 switches it off. With both on, each batch takes
            either with equal chance.
        probability: share of the batches that are mixed.
        target: ``soft`` makes the target ``(B, C)`` class probabilities, mixed like the inputs;
            ``first`` keeps the class of the first image, for methods that take their target from
            the teacher.
    """

    @checked_constructor
    def __init__(
        self,
        *,
        mixup: NonNegative = 0.0,
        cutmix: NonNegative = 0.0,
        probability: Fraction = 1.0,
        target: Literal["soft", "first"] = "soft",
    ) -> None:
        self.mixup, self.cutmix = mixup, cutmix
        self.probability, self.target = probability, target

    @property
    def mixes(self) -> bool:
        """Whether anything is on."""
        return bool((self.mixup or self.cutmix) and self.probability)

    def __call__(self, batch: Batch, num_classes: int, *words: int) -> Batch:
        """The batch without its first sample, every other one mixed with the one before it.

        Args:
            batch: inputs ``(1 + B, C, H, W)``, target ``(1 + B,)``; the first is there only as the
                partner of the second.
            num_classes: width of soft targets.
            words: name of the random stream (seed, epoch, purpose, batch number).
        """
        random = np.random.default_rng(stream_seed(*words))
        mine = batch.rows(slice(1, None))
        share, inputs, partner = 1.0, mine.inputs, batch.inputs[:-1]
        if self.mixes and random.random() < self.probability:
            cut = not self.mixup or (self.cutmix and random.random() < 0.5)
            alpha = self.cutmix if cut else self.mixup
            share = float(random.beta(alpha, alpha))
            if cut:
                inputs, share = _paste(inputs, partner, share, *random.random(2))
            else:
                inputs = inputs * share + partner * (1 - share)
        target = mine.target
        if self.target == "soft":
            one_hot = torch.nn.functional.one_hot(batch.target, num_classes).to(torch.float32)
            target = one_hot[1:] * share + one_hot[:-1] * (1 - share)
        return replace(mine, inputs=inputs, target=target)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"Mix({options})"


def _paste(
    inputs: Tensor, partner: Tensor, share: float, y: float, x: float
) -> tuple[Tensor, float]:
    """Put the partner's box centred at ``(y, x)`` in [0, 1) into a copy; also the share kept."""
    height, width = inputs.shape[2:]
    half_height = int(height * (1 - share) ** 0.5) // 2
    half_width = int(width * (1 - share) ** 0.5) // 2
    row, column = int(y * height), int(x * width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    pasted = inputs.clone()
    pasted[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)
