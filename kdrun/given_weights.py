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
from kdrun.data.tokenizers import vocabulary_of
from kdrun.errors import UserError
from kdrun.files import typed_path

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
        refuse_other_vocabulary(node, entry, data)
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


def refuse_other_start(node: Mapping[str, Any], data: DataModule) -> None:
    """Check that weights from which the student starts were made for the tokens that it will read.

    What other classes are worth as a start, training shows; but other tokens are other inputs.

    Args:
        node: the student's config entry.
        data: the data set, prepared.

    Raises:
        UserError: they were not; says what differs and how to go on.
    """
    if node["allow_other_data"] or not data.reads_classes:
        return
    refuse_other_vocabulary(node, "student", data)
    path = typed_path(node["init_from"]) if node["init_from"] else None
    if path is not None and path.is_file():
        theirs, ours = saved_for(path).get("classes"), data.signature["classes"]
        if theirs is not None and theirs != ours:
            raise UserError(
                f"student.init_from={node['init_from']} was made for another vocabulary "
                f"({in_words('classes', theirs)}) than this data set's "
                f"({in_words('classes', ours)}); student.allow_other_data=true starts from it all "
                "the same"
            )


def refuse_other_vocabulary(node: Mapping[str, Any], entry: str, data: DataModule) -> None:
    """Check that a library's pretrained weights were made for the tokens of the data set.

    Their number is compared where the network is built; here, what each stands for, as far as both
    go. A model without a tokenizer beside its weights tells nothing.

    Args:
        node: the network's config entry.
        entry: the name of that.
        data: the data set, prepared.

    Raises:
        UserError: a token stands for something else.
    """
    name = node.get("name")
    if not data.reads_classes or not node.get("pretrained") or name is None:
        return
    pairs = zip(vocabulary_of(name) or [], data.class_names, strict=False)
    for number, (theirs, ours) in enumerate(pairs):
        if theirs != ours:
            raise UserError(
                f"the pretrained {entry} {name} has another vocabulary: its token {number} is "
                f"{theirs!r}, that of dataset.tokenizer {ours!r}; teacher and student must share "
                f"one, such as dataset.tokenizer={name}; {entry}.allow_other_data=true uses it all "
                "the same"
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
