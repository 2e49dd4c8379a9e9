"""Every colour change against Pillow, through torchvision's functional interface."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from kdrun.data.augment import pixels

COUNT = 120


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 3, 9, 11), dtype=torch.uint8, generator=generator)
    images[:30] = images[:30] // 4 + 40  # low contrast
    images[30:40] = images[30:40, :1]  # grey
    images[40:45] = 7  # one colour
    images[45:60] = images[45:60] // 128 * 128  # few colours
    return images


def by_image(images: torch.Tensor, change) -> torch.Tensor:
    """``change(picture, number)`` of every image, computed by Pillow."""
    return torch.stack(
        [
            functional.pil_to_tensor(change(functional.to_pil_image(image), number))
            for number, image in enumerate(images)
        ]
    )


def uniform(low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(COUNT, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("degenerate", "adjust"),
    [
        (lambda images: torch.zeros(1, 1, 1, 1), functional.adjust_brightness),
        (pixels.grey, functional.adjust_saturation),
        (pixels.mean_grey, functional.adjust_contrast),
        (pixels.smooth, functional.adjust_sharpness),
    ],
    ids=["brightness", "saturation", "contrast", "sharpness"],
)
def test_blends(images, channels, degenerate, adjust):
    images, factor = images[:, :channels], uniform(0, 2)
    result = pixels.blend(images, degenerate(images), factor)
    expected = by_image(images, lambda image, number: adjust(image, factor[number].item()))
    assert torch.equal(result, expected)


def test_a_factor_of_one_changes_nothing(images):
    for degenerate in (pixels.grey, pixels.mean_grey, pixels.smooth):
        assert torch.equal(pixels.blend(images, degenerate(images), torch.ones(COUNT)), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_tables(images, channels):
    images = images[:, :channels]
    bits = torch.arange(COUNT) % 8 + 1
    threshold = uniform(0, 256)
    cases = [
        (pixels.posterize_table(bits), lambda i, n: functional.posterize(i, int(bits[n]))),
        (
            pixels.solarize_table(threshold),
            lambda i, n: functional.solarize(i, threshold[n].item()),
        ),
        (pixels.autocontrast_table(images), lambda i, n: functional.autocontrast(i)),
        (pixels.equalize_table(images), lambda i, n: functional.equalize(i)),
    ]
    for table, change in cases:
        assert torch.equal(pixels.look_up(images, table), by_image(images, change))


def test_hue(images):
    turn = uniform(-0.5, 0.5).double()
    result = pixels.shift_hue(images, (turn * 255).trunc().long())
    expected = by_image(images, lambda i, n: functional.adjust_hue(i, turn[n].item()))
    assert torch.equal(result, expected)
    grey = images[:, :1]
    assert pixels.shift_hue(grey, torch.ones(COUNT, dtype=torch.int64)) is grey
