"""Changing the head of a classifier: what stands before the global pooling, and the classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdrun.inputs import call_network
from kdrun.layers.taps import attach, tap_points


def find_classifier(network: nn.Module, sample: Any = None) -> str:
    """The path of the linear layer that reads the penultimate vector.

    Args:
        network: a classifier.
        sample: an input batch; needed only by networks that do not declare their taps.

    Raises:
        ValueError: the network does not end in a linear layer.
    """
    location = tap_points(network, sample).get("penultimate", "")
    path = location.removeprefix("input:")
    if path == location or not isinstance(network.get_submodule(path), nn.Linear):
        raise ValueError(f"{type(network).__name__} does not end in a linear classifier")
    return path


@torch.no_grad()
def find_pooled_map(network: nn.Module, sample: Any) -> tuple[str, torch.Size]:
    """Where the map ``(B, C, H, W)`` is whose spatial average the classifier reads.

    Found by what it is: of all outputs (and then inputs) of sub-modules in one forward, the
    outermost whose mean over space is the penultimate vector.

    Args:
        network: a classifier.
        sample: an input batch.

    Returns:
        Its location, ``path`` of the module that gives it or ``input:path`` of the one that reads
        it, and its shape for this sample.

    Raises:
        ValueError: the classifier reads no average of a map.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def recorder(path: str) -> Any:
        def record(_: nn.Module, arguments: tuple, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                outputs[path] = output.clone()
            if arguments and isinstance(arguments[0], Tensor) and arguments[0].ndim == 4:
                inputs[f"input:{path}"] = arguments[0].clone()

        return record

    taps = attach(network, ("penultimate",), sample)
    handles = [m.register_forward_hook(recorder(p)) for p, m in network.named_modules() if p]
    was_training = network.training
    try:
        network.eval()
        with taps:
            call_network(network, sample)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    vector = taps.collect()["penultimate"]
    taps.remove()
    # Features of an untrained network can be tiny: only a relative comparison tells maps apart.
    tolerance = 1e-3 * float(vector.abs().max())
    for maps in (outputs, inputs):
        found = [
            location
            for location, features in maps.items()
            if features.shape[:2] == vector.shape
            and (features.mean(dim=(2, 3)) - vector).abs().max() < tolerance
        ]
        if found:
            # The result of the pooling itself is such a map too, of size 1x1.
            location = max(found, key=lambda path: (maps[path].shape[2], -path.count(".")))
            if maps[location].shape[2] > 1 or maps is inputs:
                return location, maps[location].shape
    raise ValueError(
        f"the classifier of {type(network).__name__} does not read the spatial average of a map"
    )


def insert(network: nn.Module, location: str, module: nn.Module) -> str:
    """Let ``module`` work on what stands at ``location``; returns the path of ``module``.

    Args:
        network: changed in place.
        location: ``path`` or ``input:path``, as ``find_pooled_map`` gives it.
        module: what to insert.
    """
    path = location.removeprefix("input:")
    existing = network.get_submodule(path)
    before = path != location
    pair = (module, existing) if before else (existing, module)
    replace_module(network, path, nn.Sequential(*pair))
    return f"{path}.{0 if before else 1}"


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the sub-module at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
