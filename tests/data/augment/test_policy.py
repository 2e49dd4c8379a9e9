from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from kdrun.data.augment import Augmentation, affine
from kdrun.data.augment.policy import BLENDS, MAPS, POLICIES, TABLES, apply_policy, draw_policy

NAMES = TABLES + BLENDS + MAPS
COUNT = 140


def pictures(count: int = COUNT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, 16, 12), dtype=torch.uint8, generator=generator)


def draw(name: str, count: int = COUNT, rounds: int = 1, magnitude: int | None = None):
    generator = torch.Generator().manual_seed(3)
    return draw_policy(
        POLICIES[name], count, (3, 16, 12), generator, rounds=rounds, magnitude=magnitude
    )


def pillow(image, name: str, level: int, factor: float, maps: torch.Tensor):
    """One operation by Pillow, its parameters as drawn."""
    if name == "posterize":
        return functional.posterize(image, level)
    if name == "solarize":
        return functional.solarize(image, level)
    if name == "autocontrast":
        return functional.autocontrast(image)
    if name == "equalize":
        return functional.equalize(image)
    if name == "brightness":
        return functional.adjust_brightness(image, factor)
    if name == "saturation":
        return functional.adjust_saturation(image, factor)
    if name == "contrast":
        return functional.adjust_contrast(image, factor)
    if name == "sharpness":
        return functional.adjust_sharpness(image, factor)
    a, b, c, d, e, f = (maps.double() / 65536).tolist()
    centred = (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2)
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, centred, Image.Resampling.NEAREST)


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_image_gets_its_own_operation_and_no_other(name):
    images, draws = pictures(), draw(name)
    result = apply_policy(images, draws)
    met = set()
    for number, image in enumerate(images):
        operation = int(draws["operation"][number, 0])
        met.add(operation)
        expected = image
        if operation >= 0:
            changed = pillow(
                functional.to_pil_image(image),
                NAMES[operation],
                int(draws["level"][number, 0]),
                float(draws["factor"][number, 0]),
                draws["map"][number, 0],
            )
            expected = functional.pil_to_tensor(changed)
        assert torch.equal(result[number], expected), NAMES[operation]
    assert met == {-1, *range(len(NAMES))}


def test_rounds_follow_one_another():
    images, draws = pictures(), draw("fixmatch", rounds=2)
    one_by_one = images
    for turn in range(2):
        one_by_one = apply_policy(
            one_by_one, {key: value[:, turn : turn + 1] for key, value in draws.items()}
        )
    assert torch.equal(apply_policy(images, draws), one_by_one)


def test_operations_are_equally_likely():
    draws = draw("randaugment", 14_000, magnitude=9)
    counts = torch.bincount(draws["operation"].flatten() + 1).double()
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 34.5  # 99.9 % point, 13 degrees of freedom


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_randaugment_has_torchvisions_values(magnitude):
    draws = draw("randaugment", 2_000, magnitude=magnitude)
    operation = draws["operation"].flatten()
    space = v2.RandAugment._AUGMENTATION_SPACE
    for name, number in (("Posterize", 0), ("Solarize", 1)):
        value = float(space[name][0](31, 16, 12)[magnitude])
        if name == "Solarize":
            # A value is inverted from the threshold on; 1e-4 is lost to single precision there.
            value = math.ceil(value * 255 - 1e-4)
        assert (draws["level"].flatten()[operation == number] == int(value)).all()
    bright = draws["factor"].flatten()[operation == NAMES.index("brightness")]
    change = 0.9 * magnitude / 30
    assert torch.allclose(bright.unique(), torch.tensor([1 - change, 1 + change]).unique())
    moved = draws["map"].view(-1, 6)[operation == NAMES.index("translate_x")]
    # The constant of the map holds half a pixel besides the shift.
    shift = int(150 / 331 * 12 * magnitude / 30)
    assert set(((moved[:, 2] - 32768) // 65536).tolist()) == {shift, -shift}


THEIR_NAMES = {
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "saturation": "Color",
    "autocontrast": "AutoContrast",
}


@pytest.mark.parametrize(
    ("name", "theirs", "magnitude"),
    [
        ("randaugment", v2.RandAugment, 1),
        ("randaugment", v2.RandAugment, 9),
        ("randaugment", v2.RandAugment, 29),
        ("trivialaugment", v2.TrivialAugmentWide, None),
    ],
)
def test_every_result_is_one_of_torchvisions(name, theirs, magnitude):
    """Every operation, at the strengths that torchvision's own transform would draw."""
    count = 300 if magnitude is not None else 80
    images = pictures(count)
    images[:, :, ::3] = torch.arange(12 * 6, dtype=torch.uint8).view(6, 12) * 3 + 30  # all greys
    draws = draw(name, count, magnitude=magnitude)
    results = apply_policy(images, draws)
    space, transform = theirs._AUGMENTATION_SPACE, theirs()
    for image, result, number in zip(
        images, results, draws["operation"][:, 0].tolist(), strict=True
    ):
        ours = NAMES[number] if number >= 0 else "identity"
        their_name = THEIR_NAMES.get(ours, ours.capitalize())
        strengths, signed = space[their_name]
        strengths = strengths(31, 16, 12)
        chosen = [0.0]
        if strengths is not None:
            chosen = strengths.tolist() if magnitude is None else [strengths[magnitude].item()]
        if signed:
            chosen += [-value for value in chosen]
        picture = functional.to_pil_image(image)
        possible = [
            functional.pil_to_tensor(
                transform._apply_image_or_video_transform(
                    picture,
                    their_name,
                    # Single precision moves some thresholds off the whole number they stand for.
                    round(value * 510) / 510 if their_name == "Solarize" else value,
                    interpolation=transform.interpolation,
                    fill=transform._fill,
                )
            )
            for value in chosen
        ]
        # Likewise for factors of blends: a product that is nearly whole may be rounded down.
        allowed = 1 if ours in BLENDS else 0
        nearest = min((result.int() - one.int()).abs().max() for one in possible)
        assert nearest <= allowed, ours


def test_fixmatch_blends_between_five_and_ninety_five_percent():
    draws = draw("fixmatch", 5_000)
    operation = draws["operation"].flatten()
    factor = draws["factor"].flatten()[operation == NAMES.index("contrast")]
    assert 0.05 <= factor.min() < 0.1 and 0.9 < factor.max() <= 0.95


def test_maps_equal_torchvision():
    images = pictures()
    generator = torch.Generator().manual_seed(0)
    angle = (torch.rand(COUNT, generator=generator, dtype=torch.float64) * 2 - 1) * 135
    turned = affine.transform(images, affine.fixed_point(affine.rotation(angle, 16, 12)))
    for image, result, degrees in zip(images, turned, angle.tolist(), strict=True):
        expected = functional.rotate(functional.to_pil_image(image), degrees)
        assert torch.equal(result, functional.pil_to_tensor(expected))


def test_jitter_equals_torchvision_for_given_parameters():
    images = pictures(60)
    augmentation = Augmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    draws = augmentation.draw(60, (3, 16, 12), torch.Generator().manual_seed(5))
    result = augmentation.apply(images, draws)
    for number, image in enumerate(images):
        expected = functional.to_pil_image(image)
        brightness, contrast, saturation = draws["jitter_factor"][number].tolist()
        for change in draws["jitter_order"][number].tolist():
            if change == 0:
                expected = functional.adjust_brightness(expected, brightness)
            elif change == 1:
                expected = functional.adjust_contrast(expected, contrast)
            elif change == 2:
                expected = functional.adjust_saturation(expected, saturation)
            else:
                # One step more than the quotient would be lost to rounding in between.
                steps = int(draws["hue_steps"][number])
                expected = functional.adjust_hue(expected, (steps + 0.5 * (steps > 0)) / 255)
        assert torch.equal(result[number], functional.pil_to_tensor(expected))


def test_jitter_ranges_and_orders():
    draws = Augmentation(brightness=0.4, contrast=1.5).draw(
        4_800, (3, 8, 8), torch.Generator().manual_seed(0)
    )
    factor = draws["jitter_factor"]
    assert 0.6 <= factor[:, 0].min() < 0.61 and 1.39 < factor[:, 0].max() <= 1.4
    assert 0 <= factor[:, 1].min() < 0.01 and 2.48 < factor[:, 1].max() <= 2.5
    assert (factor[:, 2] == 1).all() and "hue_steps" not in draws
    codes = (draws["jitter_order"] * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = codes.unique(return_counts=True)[1].double()
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # 99.9 % point, 23 degrees of freedom


def test_nothing_is_drawn_where_nothing_is_on():
    nothing = Augmentation()
    assert not nothing.changes_images
    assert nothing.draw(5, (3, 8, 8), torch.Generator()) == {}
    images = pictures(5)
    assert nothing.apply(images, {}) is images


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="flip must be number in"):
        Augmentation(flip=1.5)
    with pytest.raises(ValueError, match="policy must be one of none, randaugment"):
        Augmentation(policy="randaug")
    with pytest.raises(ValueError, match="one operation per image: set policy_rounds=1"):
        Augmentation(policy="trivialaugment", policy_rounds=2)
    assert Augmentation(policy="trivialaugment", policy_rounds=1).changes_images
