"""RandAugment and its kin: a few random operations per image, on whole batches.

Every image of a batch may meet another operation. Instead of sorting images, each round makes three
passes over the batch - one table look-up, one blend, one affine map - in which an image whose
operation belongs to another pass is left exactly as it is. So nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdrun.data.augment import affine, pixels

TABLES = ("posterize", "solarize", "autocontrast", "equalize")
BLENDS = ("brightness", "saturation", "contrast", "sharpness")
MAPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


@dataclass(frozen=True)
class Operation:
    """One operation with its range of values, ``low`` at strength 0 and ``high`` at strength 1.

    Units: shear as a ratio, translation as a share of the side (or pixels, see ``Policy``),
    rotation in degrees, blends as the enhancement factor minus 1, posterize in bits and solarize as
    the threshold, both rounded down.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    signed: bool = False


@dataclass(frozen=True)
class Policy:
    """Which operations there are and how their strength is chosen.

    Attributes:
        operations: each is equally likely.
        bins: strengths are multiples of ``1 / (bins - 1)``; 0 for continuous ones.
        pixels: translations are given in pixels instead of shares of the side.
    """

    operations: tuple[Operation, ...]
    bins: int = 0
    pixels: bool = False


def _operations(
    *, shear: float, shift: float, angle: float, blend: float, bits: tuple[float, float]
) -> tuple[Operation, ...]:
    return (
        Operation("identity"),
        Operation("shear_x", 0, shear, signed=True),
        Operation("shear_y", 0, shear, signed=True),
        Operation("translate_x", 0, shift, signed=True),
        Operation("translate_y", 0, shift, signed=True),
        Operation("rotate", 0, angle, signed=True),
        *(Operation(name, 0, blend, signed=True) for name in BLENDS),
        Operation("posterize", *bits),
        # A threshold of 178.5 inverts from 179 on. With three quarters more, rounding down is
        # rounding up: at 31 strengths, thresholds are multiples of a half.
        Operation("solarize", 255.75, 0.75),
        Operation("autocontrast"),
        Operation("equalize"),
    )


POLICIES = {
    # Cubuk et al. 2019 (arXiv 1909.13719), the ranges of torchvision's RandAugment.
    "randaugment": Policy(
        _operations(shear=0.3, shift=150 / 331, angle=30, blend=0.9, bits=(8.5, 4.5)), bins=31
    ),
    # Mueller and Hutter 2021 (arXiv 2103.10158), the wide ranges of torchvision.
    "trivialaugment": Policy(
        _operations(shear=0.99, shift=32, angle=135, blend=0.99, bits=(8.5, 2.5)),
        bins=31,
        pixels=True,
    ),
    # The strong view of FixMatch (arXiv 2001.07685, appendix D): continuous strengths, enhancement
    # factors between 0.05 and 0.95.
    "fixmatch": Policy(
        (
            Operation("identity"),
            Operation("shear_x", 0, 0.3, signed=True),
            Operation("shear_y", 0, 0.3, signed=True),
            Operation("translate_x", 0, 0.3, signed=True),
            Operation("translate_y", 0, 0.3, signed=True),
            Operation("rotate", 0, 30, signed=True),
            *(Operation(name, -0.95, -0.05) for name in BLENDS),
            Operation("posterize", 4, 8),
            Operation("solarize", 0, 256),
            Operation("autocontrast"),
            Operation("equalize"),
        )
    ),
}


def draw_policy(
    policy: Policy,
    count: int,
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    rounds: int,
    magnitude: int | None,
) -> dict[str, Tensor]:
    """Random operations for ``count`` images of shape ``(C, H, W)``, on the CPU.

    Args:
        policy: the operations and their ranges.
        count: number of images.
        shape: of one image.
        generator: of the random numbers.
        rounds: operations applied to each image, one after the other.
        magnitude: the bin that sets every strength; None draws strengths at random.

    Returns:
        ``operation`` ``(count, rounds)`` as a position in ``TABLES + BLENDS + MAPS`` (-1 for
        identity), ``level`` int64 for tables, ``factor`` float32 for blends and ``map``
        ``(count, rounds, 6)`` int32.
    """
    height, width = shape[1:]
    size = (count, rounds)
    chosen = torch.randint(len(policy.operations), size, generator=generator)
    if magnitude is not None:
        strength = torch.full(size, magnitude / (policy.bins - 1), dtype=torch.float64)
    elif policy.bins:
        strength = torch.randint(policy.bins, size, generator=generator).double()
        strength /= policy.bins - 1
    else:
        strength = torch.rand(size, generator=generator, dtype=torch.float64)
    sign = 1 - 2 * torch.randint(2, size, generator=generator)
    low = torch.tensor([float(operation.low) for operation in policy.operations]).double()[chosen]
    high = torch.tensor([float(operation.high) for operation in policy.operations]).double()[chosen]
    signed = torch.tensor([operation.signed for operation in policy.operations])[chosen]
    value = (low + (high - low) * strength) * torch.where(signed, sign, 1)

    names = TABLES + BLENDS + MAPS
    numbers = torch.tensor(
        [names.index(o.name) if o.name in names else -1 for o in policy.operations]
    )
    operation = numbers[chosen]

    def is_one(name: str) -> Tensor:
        return operation == names.index(name)

    zero, one = torch.zeros_like(value), torch.ones_like(value)
    turned = affine.rotation(value.flatten(), height, width).view(*size, 6)
    side_x, side_y = (1, 1) if policy.pixels else (width, height)
    moved = torch.stack(
        [
            one,
            torch.where(is_one("shear_x"), value, zero),
            torch.where(is_one("translate_x"), (-value * side_x).trunc(), zero),
            torch.where(is_one("shear_y"), value, zero),
            one,
            torch.where(is_one("translate_y"), (-value * side_y).trunc(), zero),
        ],
        dim=-1,
    )
    maps = torch.where(is_one("rotate")[..., None], turned, moved)
    tabled = (operation >= 0) & (operation < len(TABLES))
    blended = (operation >= len(TABLES)) & (operation < len(TABLES + BLENDS))
    return {
        "operation": operation,
        "level": torch.where(tabled, value, zero).floor().long(),
        "factor": torch.where(blended, 1 + value, one).float(),
        "map": affine.fixed_point(maps),
    }


def apply_policy(images: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Apply drawn operations, rows of the result of ``draw_policy``, to ``(B, C, H, W)`` uint8."""
    for turn in range(draws["operation"].shape[1]):
        operation = draws["operation"][:, turn]
        images = _tables(images, operation, draws["level"][:, turn])
        images = _blends(images, operation, draws["factor"][:, turn])
        images = affine.transform(images, draws["map"][:, turn])
    return images


def _tables(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    table = torch.arange(256, dtype=torch.uint8, device=images.device).view(1, 1, 256)
    candidates = (
        pixels.posterize_table(level.clamp(0, 8)),
        pixels.solarize_table(level),
        pixels.autocontrast_table(images),
        pixels.equalize_table(images),
    )
    for number, candidate in enumerate(candidates):
        table = torch.where((operation == number)[:, None, None], candidate, table)
    return pixels.look_up(images, table)


def _blends(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    grey = pixels.grey(images)
    degenerate = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=images.device)
    candidates = (grey, pixels.mean_grey(images), pixels.smooth(images))
    for number, candidate in enumerate(candidates, start=len(TABLES) + 1):
        degenerate = torch.where((operation == number).view(-1, 1, 1, 1), candidate, degenerate)
    return pixels.blend(images, degenerate, factor)
