"""What a network costs, from its shapes alone, and whether it fits a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdrun.inputs import call_network

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Cost:
    """Size of a network.

    Attributes:
        parameters: all of them.
        multiply_adds: of one forward of one sample, in convolutions, linear maps and attention.
        layers: convolutions and linear layers.
    """

    parameters: int
    multiply_adds: int
    layers: int


def cost_of(build: Callable[[], nn.Module], inputs: Any) -> Cost:
    """The cost of a network, without computing a single number.

    Args:
        build: makes the network; called with torch's default device set to ``meta``.
        inputs: of one sample, on ``meta``; a mapping is passed by keyword.
    """
    with torch.device("meta"):
        network = build().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call_network(network, inputs)
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds=counter.get_total_flops() // 2,
        layers=sum(isinstance(module, COUNTED) for module in network.modules()),
    )


@dataclass(frozen=True)
class Budget:
    """Upper limits; None: no limit."""

    parameters: int | None = None
    multiply_adds: int | None = None
    layers: int | None = None

    def admits(self, cost: Cost) -> bool:
        """Whether a network keeps all limits."""
        spent = asdict(cost)
        return all(limit is None or spent[name] <= limit for name, limit in asdict(self).items())
