"""Cheaper forward passes of networks that are not trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdrun.inputs import call_network
from kdrun.layers.surgery import replace_module

LARGEST_DIFFERENCE = 1e-3
"""Between the logits before and after folding, relative to the largest of them."""


@torch.no_grad()
def fold_batch_norm(network: nn.Module, sample: Any) -> nn.Module:
    """A copy of a network with each batch normalisation folded into the convolution before it.

    Which convolution feeds which normalisation is seen in one forward, so this works for any
    network; where the two are not neighbours, both stay. A folded normalisation becomes an
    identity, and the paths of all modules stay as they are.

    Args:
        network: in evaluation mode.
        sample: inputs of a small batch.

    Raises:
        ValueError: the copy would not compute the same.
    """
    folded = copy.deepcopy(network).eval()
    before = _logits(call_network(folded, sample))
    for convolution, norm in _neighbours(folded, sample).items():
        pair = (folded.get_submodule(path) for path in (convolution, norm))
        fused = fuse_conv_bn_eval(*pair).requires_grad_(False)
        replace_module(folded, convolution, fused)
        replace_module(folded, norm, nn.Identity().eval())
    difference = (_logits(call_network(folded, sample)) - before).abs().max()
    if not difference <= LARGEST_DIFFERENCE * before.abs().max().clamp(min=1.0):
        raise ValueError(
            f"{type(network).__name__} uses outputs of convolutions besides normalising them, "
            "so its batch normalisation cannot be folded"
        )
    return folded


def run_in_bfloat16(network: nn.Module) -> nn.Module:
    """Let a network compute in bfloat16 where that is safe, and give its output in float32.

    Its weights stay as they are: the forward runs under autocast. Activations inside are bfloat16.
    """
    autocast = _Autocast()
    network.register_forward_pre_hook(autocast.enter, with_kwargs=True)
    network.register_forward_hook(autocast.leave, always_call=True)
    return network


class _Autocast:
    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[Any]] = []

    def enter(self, network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
        context = torch.autocast(tensors[0].device.type, torch.bfloat16)
        context.__enter__()
        self._entered.append(context)

    def leave(self, network: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        self._entered.pop().__exit__(None, None, None)
        if isinstance(output, Tensor):
            return output.float()
        if output is not None:  # It is None where the forward has raised.
            output.logits = output.logits.float()
        return output


def _neighbours(network: nn.Module, sample: Any) -> dict[str, str]:
    """Path of each convolution to that of the normalisation that reads its output."""
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # Alive, so that no other tensor gets their number.
    found: dict[str, str] = {}

    def after_convolution(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            made[id(output)] = path
            kept.append(output)

        return hook

    def before_norm(path: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if id(arguments[0]) in made:
                found[made[id(arguments[0])]] = path

        return hook

    handles = []
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution(path)))
        elif type(module) is nn.BatchNorm2d:  # Subclasses do more than normalise.
            handles.append(module.register_forward_pre_hook(before_norm(path)))
    try:
        call_network(network, sample)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = output["logits"]
    return output if isinstance(output, Tensor) else output.logits
