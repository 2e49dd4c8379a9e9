"""Random changes of image batches: parameters drawn on the CPU, pixels changed on the device."""

from kdrun.data.augment.augmentation import Augmentation, Draws
from kdrun.data.augment.mix import Mix

__all__ = ["Augmentation", "Draws", "Mix"]
