"""Crops, flips and erased squares of whole batches, given the parameters of every image."""

from __future__ import annotations

import torch
from torch import Tensor


def crop_flip(images: Tensor, top: Tensor, left: Tensor, mirror: Tensor, *, padding: int) -> Tensor:
    """Pad with zeros, cut a window of the original size, mirror where asked.

    Equals torchvision's ``pad``, ``crop(top, left, H, W)`` and ``hflip`` image by image. All rows
    of all windows are copied by one gather, which is several times faster than indexing pixels.

    Args:
        images: ``(B, C, H, W)``, any type.
        top: ``(B,)`` int64 in [0, 2 * padding], first row of the window in the padded image.
        left: ``(B,)`` int64 in [0, 2 * padding], first column likewise.
        mirror: ``(B,)`` bool, flip the window left to right.
        padding: pixels of zeros added on each side.

    Returns:
        ``(B, C, H, W)`` of the same type.
    """
    batch, channels, height, width = images.shape
    if not batch:  # a rank's part of a last batch that is shorter than the number of ranks
        return images
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    padded_height, padded_width = padded.shape[2:]
    # A mirrored window is the window at the mirrored place of the mirrored image.
    both = torch.stack([padded, padded.flip(3)])
    left = torch.where(mirror, 2 * padding - left, left)
    image = mirror.long() * batch + torch.arange(batch, device=images.device)
    plane = image[:, None] * channels + torch.arange(channels, device=images.device)
    row = (plane * padded_height + top[:, None])[:, :, None] + torch.arange(
        height, device=images.device
    )
    first_pixel = row * padded_width + left[:, None, None]
    windows = both.flatten().unfold(0, width, 1)
    return windows.index_select(0, first_pixel.flatten()).view(images.shape)


def cutout(images: Tensor, row: Tensor, column: Tensor, *, side: Tensor, fill: int) -> Tensor:
    """Overwrite a square around a centre; what lies outside the image is lost.

    DeVries and Taylor, 2017 (arXiv 1708.04552): the square spans ``centre - size // 2`` to
    ``centre + size // 2`` (excluded) and is clipped at the border.

    Args:
        images: ``(B, C, H, W)``.
        row: ``(B,)`` int64 in [0, H), centre of the square.
        column: ``(B,)`` int64 in [0, W).
        side: ``(B,)`` int64, of the square in pixels; 0 leaves the image as it is.
        fill: the value written, in stored units.
    """
    height, width = images.shape[2:]
    half = side // 2
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= (row - half)[:, None]) & (rows < (row + half)[:, None])
    in_columns = (columns >= (column - half)[:, None]) & (columns < (column + half)[:, None])
    erased = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return images.masked_fill(erased, fill)
