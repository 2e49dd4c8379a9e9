"""Handwritten digits that ship with scikit-learn: 1,797 images of 8x8, 10 classes, no download."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdrun.data.augment import Augmentation, Mix
from kdrun.data.batches import Preprocessing
from kdrun.data.bundled import bundled_table
from kdrun.data.module import SPLIT_SEED, DataModule, Part
from kdrun.data.normalise import Normalisation
from kdrun.data.resident import Samples
from kdrun.data.splits import per_class, stratified
from kdrun.errors import UserError
from kdrun.parameters import PositiveInt, ProperFraction

TEST_SIZE = 500
# Grey values 0..16 are kept as bytes in steps of 15, so that 8-bit image transforms apply.
STEP = 15
MEAN, STD = 4.88 * STEP / 255, 6.02 * STEP / 255


class Digits(DataModule):
    """scikit-learn's digits; a fixed stratified draw of 500 images is the test set.

    Args:
        val_fraction: share of the 1,297 training images held out for validation.
        image_size: side to which images are enlarged (bilinear); null keeps 8.
        per_class: training images kept of each class (few-shot); null keeps all.
        scale: of the inputs: ``standard`` has mean 0 and variance 1, ``unit`` is within [0, 1].
        augmentation: of training images; null for none.
        views: further augmented views by name, for methods that compare views.
        mix: mixup or CutMix of training batches; null for none.
    """

    def __init__(
        self,
        *,
        val_fraction: ProperFraction = 0.15,
        image_size: PositiveInt | None = None,
        per_class: PositiveInt | None = None,
        scale: Literal["standard", "unit"] = "standard",
        augmentation: Augmentation | None = None,
        views: dict | None = None,
        mix: Mix | None = None,
    ) -> None:
        mean, std = (MEAN, STD) if scale == "standard" else (0.0, 16 * STEP / 255)
        super().__init__(
            val_fraction=val_fraction,
            preprocessing=Preprocessing(
                Normalisation([mean], [std]), augmentation, views or {}, mix
            ),
        )
        self.image_size, self.per_class = image_size, per_class

    def load(self) -> dict[str, Samples]:
        """The 500 fixed test images and the others."""
        table, _ = bundled_table("digits.csv.gz")
        images = torch.from_numpy(table[:, :64]).float().mul_(STEP).view(-1, 1, 8, 8)
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            images = torch.nn.functional.interpolate(images, size, mode="bilinear")
        target = torch.from_numpy(table[:, 64]).long()
        self.class_names = [str(digit) for digit in range(10)]
        everything = Samples(images.round().byte(), target, torch.arange(len(target)))
        test, train = stratified(target, TEST_SIZE, seed=SPLIT_SEED)
        return {"train": everything.take(train), "test": everything.take(test)}

    def select(self, train: Part) -> Tensor:
        """Rows of the training split that are used."""
        if self.per_class is None:
            return super().select(train)
        try:
            return per_class(train.target, self.per_class, seed=SPLIT_SEED)
        except ValueError as error:
            raise UserError(f"dataset.per_class={self.per_class}: {error}") from error
