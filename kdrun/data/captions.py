"""Images with captions, some of them wrong, that a small vision-language model is trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrun.data.seeding import stream
from kdrun.parameters import Fraction, NonNegativeInt, PositiveInt, checked_constructor


class Captions:
    """Which class the caption of each image names: mostly its own.

    A model that learns from web text is unsure of some classes and confuses others in a regular
    way. Captions drawn here make such a model on the spot: an image of a class with a look-alike
    is captioned as that with probability ``confused``, and then any image as a random other class
    with probability ``random``.

    Args:
        count: images set aside from train for this purpose.
        random: share of all captions that name a random other class.
        confused: share of the images of classes with a look-alike that are captioned as it.
        look_alikes: pairs of class ids, the class and what it is taken for.
        seed: of these choices.
    """

    @checked_constructor
    def __init__(
        self,
        *,
        count: PositiveInt = 500,
        random: Fraction = 0.2,
        confused: Fraction = 0.5,
        look_alikes: list[list[NonNegativeInt]] = (),
        seed: NonNegativeInt = 0,
    ) -> None:
        if any(len(pair) != 2 for pair in look_alikes):
            raise ValueError(f"look_alikes must be pairs of class ids, got {look_alikes}")
        self.count, self.random, self.confused, self.seed = count, random, confused, seed
        self.look_alikes = [tuple(pair) for pair in look_alikes]

    def classes(self, target: Tensor, num_classes: int) -> Tensor:
        """The class that each caption names.

        Args:
            target: ``(N,)`` the true classes.
            num_classes: number of classes.

        Raises:
            ValueError: a look-alike is no class.
        """
        unknown = [pair for pair in self.look_alikes if max(pair) >= num_classes]
        if unknown:
            raise ValueError(f"look_alikes {unknown}: there are {num_classes} classes")
        generator = stream(self.seed)
        taken_for = torch.arange(num_classes)
        for own, other in self.look_alikes:
            taken_for[own] = other
        size = target.shape
        is_confused = torch.rand(size, generator=generator) < self.confused
        named = torch.where(is_confused, taken_for[target], target)
        # A step of 1 to C - 1 classes onward never comes back to the true one.
        others = target + torch.randint(1, max(num_classes, 2), size, generator=generator)
        is_random = torch.rand(size, generator=generator) < self.random
        return torch.where(is_random, others % num_classes, named)
