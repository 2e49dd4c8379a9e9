"""Shear, shift and rotation of whole batches by the nearest pixel, each image with its own map.

A map is the six numbers ``(a, b, c, d, e, f)`` that give the source of an output pixel:
``x_in = a x + b y + c``, ``y_in = d x + e y + f`` with pixel centres at halves. As in Pillow they
are held in 16.16 fixed point, so the pixels are the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fixed_point(maps: Tensor) -> Tensor:
    """Maps ``(..., 6)`` to 16.16 integers, with the constants moved to the first pixel's centre."""
    a, b, c, d, e, f = maps.double().unbind(-1)
    moved = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2], dim=-1)
    return (moved * 65536 + 0.5).floor().int()


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Maps ``(N, 6)`` that turn the image counter-clockwise about its centre."""
    radians = -degrees.double().deg2rad()
    cos, sin = radians.cos(), radians.sin()
    x, y = width / 2, height / 2
    return torch.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], dim=-1)


def transform(images: Tensor, maps: Tensor, *, fill: int = 0) -> Tensor:
    """Each output pixel takes the input pixel its map points at, or ``fill`` outside the image.

    Args:
        images: ``(B, C, H, W)`` uint8.
        maps: ``(B, 6)`` int32 from ``fixed_point``.
        fill: value of pixels that come from outside.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = maps[:, :, None, None].unbind(1)
    x = torch.arange(width, device=images.device, dtype=torch.int32)
    y = torch.arange(height, device=images.device, dtype=torch.int32)[:, None]
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = row.clamp_(0, height - 1) * width + column.clamp_(0, width - 1)
    source = source.long().flatten(1)[:, None].expand(-1, images.shape[1], -1)
    moved = images.flatten(2).gather(2, source).view_as(images)
    return moved.masked_fill_(~inside[:, None], fill)
