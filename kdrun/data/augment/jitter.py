"""Colour jitter: brightness, contrast, saturation and hue in a random order for every image."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrun.data.augment import pixels

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def draw_jitter(
    count: int,
    generator: torch.Generator,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> dict[str, Tensor]:
    """Parameters as torchvision's ``ColorJitter`` draws them, for each of ``count`` images.

    Factors are uniform in ``[max(0, 1 - x), 1 + x]``, the hue in ``[-hue, hue]`` turns.

    Returns:
        ``jitter_order`` ``(count, 4)``, which change comes in which place; ``jitter_factor``
        ``(count, 3)`` float32; ``hue_steps`` ``(count,)`` int64 in 1/255 turns, where hue is on.
    """
    order = torch.rand(count, 4, generator=generator).argsort(1)
    width = torch.tensor([brightness, contrast, saturation], dtype=torch.float64)
    low = (1 - width).clamp(min=0)
    uniform = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    draws = {
        "jitter_order": order,
        "jitter_factor": (low + (1 + width - low) * uniform).float(),
    }
    if hue:
        turn = (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1) * hue
        draws["hue_steps"] = (turn * 255).trunc().long()
    return draws


def apply_jitter(images: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Change ``(B, C, H, W)`` uint8 images by the draws of the same ``B`` samples."""
    black = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=images.device)
    for place in range(4):
        change = draws["jitter_order"][:, place].view(-1, 1, 1, 1)
        factor = draws["jitter_factor"].gather(1, change.view(-1, 1).clamp(max=2)).flatten()
        degenerate = torch.where(change == CONTRAST, pixels.mean_grey(images), black)
        degenerate = torch.where(change == SATURATION, pixels.grey(images), degenerate)
        blended = pixels.blend(images, degenerate, factor)
        turned = pixels.shift_hue(images, draws["hue_steps"]) if "hue_steps" in draws else images
        images = torch.where(change == HUE, turned, blended)
    return images
