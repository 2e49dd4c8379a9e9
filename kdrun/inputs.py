"""How networks are given their inputs: one tensor, or several by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


def call_network(network: nn.Module, inputs: Any) -> Any:
    """The network's output; a mapping of inputs is passed by keyword."""
    return network(**inputs) if isinstance(inputs, Mapping) else network(inputs)


def read_only(network: nn.Module, name: str) -> nn.Module:
    """Let a network read one of several inputs.

    Called by keyword, it takes the input ``name`` as its only argument; called with one tensor, it
    takes that. The network itself is not wrapped, so the paths of its parts stay as they are.
    """
    network.register_forward_pre_hook(_Select(name), with_kwargs=True)
    return network


@dataclass(frozen=True)
class _Select:
    name: str

    def __call__(
        self, network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (arguments, named) if arguments else ((named[self.name],), {})
