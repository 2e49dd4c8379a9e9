"""From a ``model`` config node to a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from kdrun.build import instantiate, resolve
from kdrun.errors import UserError
from kdrun.inputs import read_only
from kdrun.targets import KEY

ROLE_KEYS = (
    *("checkpoint", "init_from", "finetune", "weights", "seed", "mode", "precision", "fold"),
    *("allow_chance", "allow_other_data"),
    *("cache", "cache_views", "cache_seed", "cache_top_k", "cache_dtype"),
)
"""Entries of a network's config node that say what it is for, not what it is."""


def build_model(
    node: Mapping[str, Any],
    *,
    num_classes: int,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None,
    also: Mapping[str, Callable[[], Any]] | None = None,
) -> nn.Module:
    """Build the network of a config node for a data set.

    Where the constructor has the parameters ``num_classes``, ``in_channels``, ``image_size``,
    ``input_shape`` or one of ``also`` and the node leaves them out or null, the data set fills them
    in; so a class of the user's own needs none of them.

    Args:
        node: ``_target_``, its arguments, possibly entries of the role (``ROLE_KEYS``), and
            ``reads``: which of several inputs the network reads; without it, it is given all.
        num_classes: classes of the data set.
        input_shape: shape of one sample: ``(C, H, W)`` of images; by name where a sample has
            several inputs; None where it varies.
        also: what else the data set can tell, by the name of the constructor's parameter; called
            only for those that the constructor has.

    Raises:
        UserError: the node cannot be built, reads images where there are none, or is no network.
    """
    node = {key: value for key, value in node.items() if key not in ROLE_KEYS}
    reads = node.pop("reads", None)
    if reads is not None:
        input_shape = _shape_of(reads, input_shape)
    target = node.get(KEY)
    if target is None:
        raise UserError(f"a model node needs {KEY}; it has {', '.join(node) or 'nothing'}")
    known: dict[str, Any] = {"num_classes": num_classes}
    if input_shape is not None:
        known["input_shape"] = input_shape
        if isinstance(input_shape, Sequence) and len(input_shape) == 3:
            known |= {"in_channels": input_shape[0], "image_size": input_shape[-1]}
    parameters = inspect.signature(resolve(target)).parameters
    known |= {name: tell() for name, tell in (also or {}).items() if name in parameters}
    wanted = [name for name in known if name in parameters and node.get(name) is None]
    lacks_channels = "in_channels" not in known and node.get("in_channels") is None
    if "in_channels" in parameters and lacks_channels:
        raise UserError(
            f"{target} reads images, but a sample of this data set has shape {input_shape}; "
            "choose another network, such as mlp"
        )
    network = instantiate(node, **{name: known[name] for name in wanted})
    if not isinstance(network, nn.Module):
        raise UserError(f"{target} gives a {type(network).__name__}, not a network")
    return network if reads is None else read_only(network, reads)


def _shape_of(reads: str, shapes: Any) -> Sequence[int]:
    if not isinstance(shapes, Mapping):
        raise UserError(f"reads={reads}: a sample of this data set is one tensor; leave it null")
    if reads not in shapes:
        raise UserError(f"reads={reads}: a sample of this data set has {', '.join(shapes)}")
    return shapes[reads]
