"""From encoded images to arrays of one size."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from kdrun.cores import usable_cores
from kdrun.data.sources import ImageSource
from kdrun.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}
"""Pillow's name for images of so many channels."""


def decode(source: ImageSource, number: int, channels: int) -> Image:
    """One image, converted to grey (1 channel) or RGB (3).

    Of 16-bit grey the upper byte is kept, as Pillow does with 16-bit colour.

    Raises:
        UserError: if it cannot be decoded, or has no fixed range of values (32-bit integers,
            floating point); names the file or row.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source.read(number))) as image:
            if image.mode.startswith("I;16"):  # Pillow would make white of all that exceeds 255.
                bytes_ = (np.asarray(image) >> 8).astype(np.uint8)
                return Image.fromarray(bytes_).convert(MODES[channels])
            if image.mode in ("I", "F"):
                raise UserError(
                    f"{source.where(number)}: pixels of type {image.mode!r} (Pillow's name) have "
                    "no fixed range; store them with 8 or 16 bits"
                )
            return image.convert(MODES[channels])
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"cannot decode {source.where(number)}: not a known image") from error
    except Exception as error:
        # Decoders of damaged files run into whatever there is, from a missing key to a size that
        # no memory holds.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot decode {source.where(number)}: {reason}") from error


def resize_and_crop(image: Image, resize: int, size: int) -> Image:
    """Shorter side to ``resize`` pixels (bilinear, antialiased), then the central square.

    The usual evaluation transform; equals torchvision's ``Resize`` and ``CenterCrop``.
    """
    from torchvision.transforms.v2 import functional

    resized = functional.resize(image, [resize])
    return functional.center_crop(resized, [size, size])


def to_array(image: Image) -> np.ndarray:
    """``(C, H, W)`` uint8."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def decode_all(
    source: ImageSource, out: np.ndarray, *, size: int | None, resize: int | None
) -> None:
    """Decode a whole source into ``out`` ``(N, C, H, W)`` uint8, on all cores.

    Args:
        source: the images.
        out: the result, of the right shape.
        size: side of the central square; None keeps images as they are.
        resize: the shorter side before that; None: ``size``.

    Raises:
        UserError: if an image cannot be decoded or differs in size.
    """
    channels = out.shape[1]

    def fill(number: int) -> None:
        image = decode(source, number, channels)
        if size is not None and (image.size != (size, size) or resize not in (None, size)):
            image = resize_and_crop(image, resize or size, size)
        array = to_array(image)
        if array.shape != out.shape[1:]:
            raise UserError(
                f"{source.where(number)} is {image.size[0]}x{image.size[1]}, the first image is "
                f"{out.shape[3]}x{out.shape[2]}: set dataset.image_size"
            )
        out[number] = array

    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(fill, range(out.shape[0]), chunksize=256):
            pass


def check_memory(shape: tuple[int, ...]) -> None:
    """Refuse to hold uint8 images of this total shape in a machine that is too small.

    Raises:
        UserError: if they need more than half of the memory.
    """
    needed = int(np.prod(shape, dtype=np.int64))
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present / 2:
        raise UserError(
            f"{shape[0]} images of {shape[3]}x{shape[2]} need {needed / 2**30:.0f} GiB of the "
            f"{present / 2**30:.0f} GiB here: set dataset.storage=stream"
        )
