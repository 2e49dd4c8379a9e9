"""The architectures among which a search chooses: values for options of a network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator

Choices = tuple[int, ...]
"""A candidate: for each place the number of the value that is taken there."""


@dataclass(frozen=True)
class Place:
    """One decision: an option of the network, or one entry of an option that is a list."""

    option: str
    entry: int | None
    values: tuple[Any, ...]


class SearchSpace:
    """All combinations of values for some options of a network.

    ``{"width": [8, 16]}`` decides one option; ``{"blocks": [[1, 3], [1, 3, 5]]}`` decides the two
    entries of an option that is a list. An option is never decided in part: a list has values for
    each of its entries.

    Args:
        options: by option, the values it may have, or a list of values for each of its entries.

    Raises:
        ValueError: there is nothing to choose from, or a value comes twice.
    """

    def __init__(self, options: Mapping[str, Sequence[Any]]) -> None:
        places: list[Place] = []
        for option, values in options.items():
            if not isinstance(values, (list, tuple)) or not values:
                raise ValueError(f"space.{option}: must be a list of values, got {values}")
            if all(isinstance(each, (list, tuple)) for each in values):
                places += [Place(option, i, tuple(each)) for i, each in enumerate(values)]
            else:
                places.append(Place(option, None, tuple(values)))
        for place in places:
            if not place.values or len(set(place.values)) != len(place.values):
                raise ValueError(
                    f"space.{place.option}: needs different values to choose from, got "
                    f"{list(place.values)}"
                )
        if not places:
            raise ValueError("space: there is no option to choose")
        self.places = tuple(places)

    @property
    def size(self) -> int:
        """Number of architectures."""
        return math.prod(len(place.values) for place in self.places)

    def __iter__(self) -> Iterator[Choices]:
        """All candidates; the last place varies fastest."""
        return itertools.product(*(range(len(place.values)) for place in self.places))

    def sample(self, generator: Generator) -> Choices:
        """A candidate with every value equally likely at every place."""
        return tuple(_below(len(place.values), generator) for place in self.places)

    def mutate(self, choices: Choices, generator: Generator, count: int = 1) -> Choices:
        """The candidate with other values at ``count`` random places that have others."""
        free = [i for i, place in enumerate(self.places) if len(place.values) > 1]
        order = torch.randperm(len(free), generator=generator)[:count].tolist()
        changed = list(choices)
        for number in order:
            place = free[number]
            other = _below(len(self.places[place].values) - 1, generator)
            changed[place] = other + (other >= choices[place])
        return tuple(changed)

    def options(self, choices: Choices) -> dict[str, Any]:
        """The options of the network that a candidate stands for."""
        options: dict[str, Any] = {}
        for place, number in zip(self.places, choices, strict=True):
            if place.entry is None:
                options[place.option] = place.values[number]
            else:
                options.setdefault(place.option, []).append(place.values[number])
        return options


def _below(limit: int, generator: Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
