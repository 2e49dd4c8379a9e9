"""Colour changes of whole 8-bit batches, each image with its own parameter.

All arithmetic follows Pillow, which the literature's transforms call, and is exact in integers or
correctly rounded, so the pixels are the same on every device.

Images are ``(B, C, H, W)`` uint8 with ``C`` 1 or 3. A *table* maps each of the 256 grey values,
``(B, C, 256)`` or ``(B, 1, 256)`` uint8. A *degenerate* is the image at factor 0 of an enhancement.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace every value by its entry in the table of its image and channel."""
    batch, channels = images.shape[:2]
    table = table.expand(batch, channels, 256)
    return table.gather(2, images.flatten(2).long()).view_as(images)


def posterize_table(bits: Tensor) -> Tensor:
    """Keep the ``bits`` highest bits; ``bits`` ``(B,)`` int64 in [0, 8]."""
    values = torch.arange(256, device=bits.device)
    return ((values >> (8 - bits)[:, None]) << (8 - bits)[:, None]).byte()[:, None]


def solarize_table(threshold: Tensor) -> Tensor:
    """Invert values from ``threshold`` on; ``threshold`` ``(B,)``, 256 inverts nothing."""
    values = torch.arange(256, device=threshold.device)
    return torch.where(values < threshold[:, None], values, 255 - values).byte()[:, None]


def autocontrast_table(images: Tensor) -> Tensor:
    """Stretch each channel so that its darkest value becomes 0 and its brightest 255."""
    low, high = (bound.double()[..., None] for bound in images.flatten(2).aminmax(dim=2))
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    # A number over a tensor would be computed as the reciprocal times the number: two roundings.
    scale = torch.full_like(low, 255).div_((high - low).clamp(min=1))
    stretched = (values * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, values).byte()


def equalize_table(images: Tensor) -> Tensor:
    """Spread the histogram of each channel evenly."""
    flat = images.flatten(2).long()
    histogram = flat.new_zeros((*flat.shape[:2], 256))
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - histogram.gather(2, brightest)) // 255
    below = histogram.cumsum(2) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table, torch.arange(256, device=images.device)).byte()


def blend(images: Tensor, degenerate: Tensor, factor: Tensor) -> Tensor:
    """``degenerate + factor * (images - degenerate)``, clipped to 8 bits and rounded down.

    Args:
        images: the images.
        degenerate: integers, broadcastable to ``images``.
        factor: ``(B,)`` float32; 1 leaves an image exactly as it is.
    """
    start = degenerate.float()
    # Two roundings, as on the CPU: a fused multiply-add would differ between devices.
    change = (images.float() - start).mul_(factor.view(-1, 1, 1, 1))
    return change.add_(start).clamp_(0, 255).byte()


def grey(images: Tensor) -> Tensor:
    """Luma ``(B, 1, H, W)`` int32 in [0, 255], in Pillow's 16-bit fixed point (ITU-R 601)."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595).add_(green * 38470).add_(blue * 7471).add_(0x8000) >> 16


def mean_grey(images: Tensor) -> Tensor:
    """Mean luma of each image rounded to the nearest integer, ``(B, 1, 1, 1)`` int64."""
    size = images.shape[2] * images.shape[3]
    return (2 * grey(images).sum((2, 3), keepdim=True) + size) // (2 * size)


def smooth(images: Tensor) -> Tensor:
    """3x3 mean with the centre weighted 5, rounded; border pixels stay. ``(B, C, H, W)`` int16."""
    pixels = images.short()
    result = pixels.clone()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    result[:, :, 1:-1, 1:-1] = (2 * box + 13) // 26
    return result


def shift_hue(images: Tensor, steps: Tensor) -> Tensor:
    """Turn the hue circle of 256 steps by ``steps`` ``(B,)`` int64, through Pillow's 8-bit HSV."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.short().unbind(1)
    darkest, value = images.short().aminmax(dim=1)
    spread = (value - darkest).float()
    coloured = spread > 0
    divisor = torch.where(coloured, spread, 1.0)
    saturation = (spread / value.clamp(min=1).float()).double().mul_(255).long()
    r, g, b = ((value - channel).float() / divisor for channel in (red, green, blue))
    # Pillow computes in double precision what it then keeps in single.
    r, g, b = r.double(), g.double(), b.double()
    sector = torch.where(red == value, b - g, torch.where(green == value, 2 + r - b, 4 + g - r))
    turn = (sector.float().double() / 6 + 1).fmod_(1).float()
    hue = (turn.double() * 255).long() + steps.view(-1, 1, 1)
    return _rgb(torch.where(coloured, hue, steps.view(-1, 1, 1)) % 256, saturation, value)


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """8-bit HSV, ``(B, H, W)`` each, to RGB ``(B, 3, H, W)``."""
    sixth = hue.float().double() * 6 / 255
    sector = sixth.floor()
    fraction = (sixth - sector).float().double()
    strength = (saturation.double() / 255).float().double()
    bright = value.double()

    def rounded(x: Tensor) -> Tensor:
        return (x + 0.5).floor_().clamp_(0, 255).byte()

    low = rounded(bright * (1 - strength))
    falling = rounded(bright * (1 - strength * fraction))
    rising = rounded(bright * (1 - strength * (1 - fraction)))
    levels = torch.stack([value.byte(), low, falling, rising], dim=1)
    choice = _level_by_sector(hue.device)
    return levels.gather(1, choice[:, sector.long() % 6].transpose(0, 1))


@functools.cache
def _level_by_sector(device: torch.device) -> Tensor:
    """Which of (value, low, falling, rising) each channel takes in each sixth of the hue circle.

    Kept per device: sending even a small table there would make the host wait.
    """
    return torch.tensor([[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]], device=device)
