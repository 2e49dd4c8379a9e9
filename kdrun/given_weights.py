"""Whether weights that come from elsewhere were made for the data at hand.

A network gives numbers for any input of the right shape. That its classes come in another order, or
that it was trained on inputs normalised otherwise, shows only in what it is worth. So weight files
of kdrun say what they were trained on, and the networks of libraries what their weights expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from kdrun.assembly import build_untrained
from kdrun.checkpoints import saved_for
from kdrun.data.module import DataModule
from kdrun.errors import UserError

NORMALISATION = "normalisation"
TOLERANCE = 0.05
"""Largest difference of two normalisations, in standard deviations of the inputs."""


@runtime_checkable
class HasInputNormalisation(Protocol):
    """A network whose library says how inputs of its pretrained weights are normalised.

    ``input_normalisation`` is the mean and the standard deviation of each channel, in [0, 1].
    """

    input_normalisation: tuple[Sequence[float], Sequence[float]]


@runtime_checkable
class ConvertsInputs(Protocol):
    """A network that normalises the data set's images anew before its weights see them.

    ``converted_normalisation`` is how, as ``input_normalisation``.
    """

    converted_normalisation: tuple[Sequence[float], Sequence[float]]


def refuse_other_data(node: Mapping[str, Any], entry: str, data: DataModule) -> None:
    """Check that a frozen network's given weights were made for these classes and inputs.

    Args:
        node: its config entry.
        entry: the name of that.
        data: the data set, prepared.

    Raises:
        UserError: they were not; says what differs and how to go on.
    """
    if node["finetune"] or node["allow_other_data"]:
        return
    given, whose = data.signature, "this data set's"
    hint = "set dataset.mean and dataset.std; "
    if node["checkpoint"]:
        origin = f"{entry}.checkpoint={node['checkpoint']}"
        expected = saved_for(Path(node["checkpoint"]).expanduser())
    elif node.get("pretrained"):
        origin = f"the pretrained {entry}"
        network = build_untrained(node, data, 0)
        expected = _of_library(network)
        if isinstance(network, ConvertsInputs):
            given = {NORMALISATION: _as_json(network.converted_normalisation)}
            whose, hint = "what it is given", f"leave {entry}.mean and {entry}.std null; "
    else:
        return
    for name, theirs in expected.items():
        ours = given.get(name)
        if ours is not None and not _agree(name, theirs, ours):
            raise UserError(
                f"{origin} was made for other {name} ({in_words(name, theirs)}) than {whose} "
                f"({in_words(name, ours)}); {hint if name == NORMALISATION else ''}"
                f"{entry}.finetune=true trains it further, {entry}.allow_other_data=true uses it "
                "all the same"
            )


def in_words(name: str, text: str) -> str:
    """An entry of ``DataModule.signature`` for a message."""
    facts = json.loads(text)
    if name == "classes":
        shown = ", ".join(facts["first"])
        return f"{facts['count']}: {shown}{', ...' if facts['count'] > len(facts['first']) else ''}"
    mean, std = (", ".join(f"{value:.4g}" for value in facts[key]) for key in ("mean", "std"))
    return f"mean {mean}, std {std}"


def _of_library(network: nn.Module) -> dict[str, str]:
    if not isinstance(network, HasInputNormalisation):
        return {}
    return {NORMALISATION: _as_json(network.input_normalisation)}


def _as_json(normalisation: tuple[Sequence[float], Sequence[float]]) -> str:
    mean, std = normalisation
    return json.dumps({"mean": list(mean), "std": list(std)})


def _agree(name: str, first: str, second: str) -> bool:
    if name == "classes":
        return first == second
    ours, theirs = json.loads(first), json.loads(second)
    if len(ours["mean"]) != len(theirs["mean"]):
        return True  # Other channels: the shapes of the weights decide.
    return all(
        abs(a - b) <= TOLERANCE * scale
        for key in ("mean", "std")
        for a, b, scale in zip(ours[key], theirs[key], theirs["std"], strict=True)
    )
