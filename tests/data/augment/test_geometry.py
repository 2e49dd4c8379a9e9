from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from kdrun.data.augment import Augmentation
from kdrun.data.augment.geometry import crop_flip, cutout


def pictures(count: int, height: int = 9, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_crop_and_flip_equals_torchvision(padding, dtype):
    places = 2 * padding + 1
    top, left, mirror = torch.cartesian_prod(
        torch.arange(places), torch.arange(places), torch.arange(2)
    ).unbind(1)
    mirror = mirror.bool()
    images = pictures(len(top)).to(dtype)
    result = crop_flip(images, top, left, mirror, padding=padding)
    assert result.dtype == dtype
    for number, image in enumerate(images):
        padded = functional.pad(image, [padding])
        expected = functional.crop(padded, int(top[number]), int(left[number]), 9, 7)
        if mirror[number]:
            expected = functional.horizontal_flip(expected)
        assert torch.equal(result[number], expected)


def test_offsets_and_flips_are_distributed_as_in_torchvision():
    # RandomCrop draws each offset uniformly from the 2 p + 1 there are, RandomHorizontalFlip flips
    # with its probability, all independent: every one of the 2 * 9 * 9 outcomes is equally likely.
    count, outcomes = 162_000, 162
    generator = torch.Generator().manual_seed(0)
    draws = Augmentation(crop_padding=4, flip=0.5).draw(count, (3, 32, 32), generator)
    outcome = (draws["top"] * 9 + draws["left"]) * 2 + draws["mirror"]
    observed = torch.bincount(outcome, minlength=outcomes).double()
    expected = count / outcomes
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert len(observed) == outcomes
    assert chi_square < 222  # 99.9 % point for 161 degrees of freedom


def test_whole_pipeline_equals_torchvision_in_distribution():
    # One picture whose crops can all be told apart: count which of the 18 possible results comes.
    from torchvision.transforms import v2

    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    count = 9_000
    torch.manual_seed(0)
    theirs = v2.Compose([v2.RandomCrop(3, padding=1), v2.RandomHorizontalFlip()])
    ours = Augmentation(crop_padding=1, flip=0.5)
    draws = ours.draw(count, (1, 3, 3), torch.Generator().manual_seed(0))
    results = ours.apply(image.expand(count, 1, 3, 3).contiguous(), draws)
    found = torch.stack([theirs(image) for _ in range(count)])
    kinds = torch.unique(results.flatten(1), dim=0)
    assert torch.equal(kinds, torch.unique(found.flatten(1), dim=0))
    counts = [
        (pile.flatten(1)[:, None] == kinds).all(2).sum(0).double() for pile in (results, found)
    ]
    chi_square = ((counts[0] - counts[1]) ** 2 / (counts[0] + counts[1])).sum()
    assert len(kinds) == 18
    assert chi_square < 40.8  # 99.9 % point for 17 degrees of freedom


def test_flip_probability():
    generator = torch.Generator().manual_seed(0)
    for probability in (0.0, 0.25, 1.0):
        mirror = Augmentation(flip=probability, crop_padding=1).draw(10_000, (3, 8, 8), generator)
        assert abs(mirror["mirror"].float().mean() - probability) < 0.02


def test_cutout_overwrites_a_clipped_square():
    images = pictures(3, 6, 6)
    result = cutout(
        images,
        torch.tensor([3, 0, 2]),
        torch.tensor([3, 5, 2]),
        side=torch.tensor([4, 4, 0]),
        fill=0,
    )
    expected = images.clone()
    expected[0, :, 1:5, 1:5] = 0
    expected[1, :, 0:2, 3:6] = 0
    assert torch.equal(result, expected)


def test_cutout_sides():
    draw = Augmentation(cutout=4, cutout_side="uniform").draw
    side = draw(5_000, (3, 8, 8), torch.Generator().manual_seed(0))["side"]
    assert torch.bincount(side).double().div(1_000).sub(1).abs().max() < 0.15
    fixed = Augmentation(cutout=4).draw(10, (3, 8, 8), torch.Generator())["side"]
    assert (fixed == 4).all()
