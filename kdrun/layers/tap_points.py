"""Where the taps of a network are that does not say so itself: one forward shows it.

Networks of timm, torchvision and transformers, and anybody's own, are read in the same way. The
calls of one forward form a tree. Containers that span several resolutions are opened until a trunk
is left, a list of modules run one after another; the last module at each resolution ends a stage.
Networks of one resolution (ViT, MLP-Mixer, language models) are cut by depth instead, in the
proportions 2-2-6-2 of a twelve-block hierarchical transformer: after blocks 2, 4, 10 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.inputs import call_network
from kdrun.layers.layout import Layout

STAGES = 4
"""At most this many stages are named, from the deepest up; the one before them is the stem."""

DEPTH_OF_STAGES = (2 / 12, 4 / 12, 10 / 12, 1.0)

SPECIAL_TOKENS = ("cls_token", "class_token", "dist_token", "distillation_token")
REGISTER_TOKENS = ("reg_token", "register_tokens")

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish)
ACTIVATIONS += (nn.Hardswish,)

CHANNELS_LAST = {
    "timm": ("Sequencer2d", "VOLO"),
    "torchvision": ("SwinTransformer",),
}
"""Networks by library whose stages give maps ``(B, H, W, C)`` though nothing in them says so."""

WHOLE = ("stem", "patch_embed")
"""Modules of these names lead into the first stage however many resolutions they pass."""


def derive_layout(network: nn.Module) -> Layout | None:
    """The layout of a network of a known library, or of one that names its special tokens.

    None for a network without 2-d convolutions: its features have no image positions.
    """
    if not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return None
    library = type(network).__module__.split(".")[0]
    channels_last = type(network).__name__ in CHANNELS_LAST.get(library, ())
    if library == "timm":
        return Layout(
            special_tokens=getattr(network, "num_prefix_tokens", 0),
            channels_last=channels_last or getattr(network, "output_fmt", "NCHW") == "NHWC",
        )
    tokens = [
        parameter.shape[1]
        for name, parameter in network.named_parameters()
        if name.rpartition(".")[2] in SPECIAL_TOKENS + REGISTER_TOKENS
    ]
    return Layout(special_tokens=sum(tokens), channels_last=channels_last)


def derive_tap_points(network: nn.Module, sample: Any) -> dict[str, str]:
    """Taps of a network, found by one forward of ``sample`` in evaluation mode without gradients.

    Args:
        network: a classifier that gives logits, or an object with ``.logits``.
        sample: an input batch (a mapping is passed as keywords), of which one row is used.

    Returns:
        Locations by tap name: ``stem`` (where there is one), ``stage1`` ..., each with
        ``.preactivation`` and ``.norm`` where it ends in a rectifier, and ``penultimate``.

    Raises:
        ValueError: no sample was given.
    """
    if sample is None:
        raise ValueError(
            f"{type(network).__name__} does not declare its taps (a method tap_points()); "
            "a sample input is needed to find them"
        )
    layout = derive_layout(network) or Layout()
    root = _trace(network, sample, layout.channels_last)
    points: dict[str, str] = {}
    classifier = _classifier(network, root)
    for name, call in _name_stages(_stage_ends(root, classifier)).items():
        points[name] = call.path
        points |= _rectifier_taps(name, call, root)
    if classifier is not None:
        points["penultimate"] = f"input:{classifier}"
    return points


# -- the calls of one forward --------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    """One call of a sub-module, with the calls it made. Tensors are kept to tell them apart.

    ``entry`` and ``positions`` count the spatial positions or tokens of input and output, 0 for
    vectors.
    """

    path: str
    module: nn.Module
    input: Tensor | None = None
    output: Tensor | None = None
    entry: int = 0
    positions: int = 0
    calls: list[_Call] = field(default_factory=list)

    def walk(self) -> Iterator[_Call]:
        """This call and all below it, in order of their start."""
        yield self
        for call in self.calls:
            yield from call.walk()

    def has_parameters(self) -> bool:
        return next(self.module.parameters(), None) is not None


def _positions(tensor: Tensor | None, image: Any, channels_last: bool) -> int:
    """Positions of a feature: by the proportions of the image where they tell, else as given."""
    # The trace runs on one sample; more rows than one are windows or tables, not a resolution.
    if tensor is None or tensor.ndim not in (3, 4) or tensor.shape[0] != 1:
        return 0
    if tensor.ndim == 3:
        return tensor.shape[1]
    if isinstance(image, Tensor) and image.ndim == 4:
        height, width = image.shape[2:]
        # Within one position of the image's proportions.
        is_last, is_first = (
            abs(rows * width - columns * height) < max(height, width)
            for rows, columns in (tensor.shape[1:3], tensor.shape[2:4])
        )
        channels_last = channels_last if is_last == is_first else is_last
    return math.prod(tensor.shape[1:3] if channels_last else tensor.shape[2:4])


def _trace(network: nn.Module, sample: Any, channels_last: bool) -> _Call:
    root = _Call("", network)
    open_calls = [root]
    if isinstance(sample, Mapping):
        sample = {name: value[:1] for name, value in sample.items()}
    else:
        sample = sample[:1]

    def enter(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, arguments: tuple, named: dict) -> None:
            call = _Call(path, module, input=first_tensor(arguments or named))
            is_image = call.input is sample
            call.entry = _positions(call.input, sample, channels_last and not is_image)
            open_calls[-1].calls.append(call)
            open_calls.append(call)

        return hook

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        call = open_calls.pop()
        call.output = first_tensor(output)
        is_channels_first = isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
        call.positions = _positions(call.output, sample, channels_last and not is_channels_first)

    handles = []
    for path, module in network.named_modules():
        if path:
            pre_hook = module.register_forward_pre_hook(enter(path, module), with_kwargs=True)
            handles += [pre_hook, module.register_forward_hook(leave)]
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.no_grad():
            output = call_network(network, sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    root.output = first_tensor(output if isinstance(output, Tensor) else output.logits)
    return root


def first_tensor(value: Any) -> Tensor | None:
    """The tensor in what a module reads or gives, alone or first in a tuple or mapping."""
    while not isinstance(value, Tensor):
        items = value.values() if isinstance(value, Mapping) else value
        if not isinstance(value, (Mapping, tuple, list)) or not value:
            return None
        value = next(iter(items))
    return value


# -- stages ----------------------------------------------------------------------------------------


def _stage_ends(root: _Call, classifier: str | None) -> list[_Call]:
    """The last call at each resolution, shallow to deep."""
    ends: list[_Call] = []
    resolution = math.inf
    for call in _trunk(root, classifier):
        positions = call.positions
        # One position left: pooling, or the convolution that stands in for a linear layer.
        pooled_away = positions == 1 < resolution and (resolution > 4 or not call.has_parameters())
        if call.path == classifier or (ends and (positions == 0 or pooled_away)):
            break
        if positions == 0 or not _ends_stage(call):
            continue
        if _is_reduced(positions, resolution):
            ends.append(call)
            resolution = positions
        elif positions <= 1.1 * resolution:
            ends[-1:] = [call]
    return ends if len(ends) > 1 else _by_depth(_longest_run(root)) or ends


def _ends_stage(call: _Call) -> bool:
    """Pooling, dropout, reshaping and a closing layer norm do not count as part of a stage."""
    if isinstance(call.module, ACTIVATIONS):
        return True
    return call.has_parameters() and not isinstance(call.module, nn.LayerNorm)


def _by_depth(blocks: list[_Call]) -> list[_Call]:
    depths = [max(round(share * len(blocks)), 1) for share in DEPTH_OF_STAGES]
    if len(blocks) <= STAGES:
        depths = list(range(1, len(blocks) + 1))
    return [blocks[depth - 1] for depth in depths] if len(blocks) > 1 else []


def _is_reduced(positions: int, before: int) -> bool:
    return positions <= 0.6 * before


def _trunk(call: _Call, classifier: str | None) -> list[_Call]:
    """The calls one after another that make up ``call``, none spanning several resolutions."""
    holds_classifier = classifier is not None and classifier.startswith(f"{call.path}.")
    is_whole = call.path.rpartition(".")[2] in WHOLE or not _spans_resolutions(call)
    if call.path and is_whole and not holds_classifier:
        return [call]
    return [unit for inner in call.calls for unit in _trunk(inner, classifier)]


def _spans_resolutions(call: _Call) -> bool:
    if len(call.calls) < 2 and not (call.calls and _spans_resolutions(call.calls[0])):
        return False
    # One position is left out: the squeeze of squeeze-and-excitation.
    inside = {inner.positions for inner in call.walk() if inner is not call} - {0, 1}
    reduced = sorted((size for size in inside if _is_reduced(size, call.entry)), reverse=True)
    if reduced and _is_reduced(reduced[-1], reduced[0]):
        return True
    # A reduction that closes the call (patch merging) belongs to the next stage; one that runs
    # beside the rest (a strided shortcut) does not read what came before it.
    *_, before, last = [None, *call.calls]
    return (
        before is not None
        and last.input is before.output
        and last.positions > 1
        and _is_reduced(last.positions, before.positions)
    )


def _longest_run(root: _Call) -> list[_Call]:
    """The longest series of neighbouring calls of the same class and output shape."""
    longest: list[_Call] = []
    for parent in root.walk():
        run: list[_Call] = []
        for call in parent.calls:
            same = (
                run
                and type(call.module) is type(run[-1].module)
                and _shape(call) == _shape(run[-1])
            )
            run = [*run, call] if same else [call]
            if call.calls and call.positions and len(run) > len(longest):
                longest = run
    return longest


def _shape(call: _Call) -> torch.Size | None:
    return None if call.output is None else call.output.shape


def _name_stages(ends: list[_Call]) -> dict[str, _Call]:
    named = {"stem": ends[-STAGES - 1]} if len(ends) > STAGES else {}
    return named | {f"stage{i}": call for i, call in enumerate(ends[-STAGES:], start=1)}


def _rectifier_taps(name: str, stage: _Call, root: _Call) -> dict[str, str]:
    """``.preactivation`` and ``.norm`` of a stage that ends in a rectifier."""
    last = list(stage.walk())[-1]
    if not isinstance(last.module, ACTIVATIONS) or last.output is not stage.output:
        return {}
    taps = {f"{name}.preactivation": f"input:{last.path}"}
    parent = last.path.rpartition(".")[0]
    norm, block_input = None, None
    for call in root.walk():
        if call is last:
            break
        if call.path == parent:
            block_input = call.input
        beside = parent in (call.path, call.path.rpartition(".")[0])
        if beside and isinstance(call.module, nn.BatchNorm2d):
            # One that reads the block's own input normalises a shortcut.
            is_shortcut = call.path != parent and call.input is block_input
            norm = norm if is_shortcut else call.path
    return taps if norm is None else taps | {f"{name}.norm": norm}


def _classifier(network: nn.Module, root: _Call) -> str | None:
    """The path of the last linear layer (or 1x1 convolution) as wide as the logits."""
    if type(network).__module__.startswith("timm."):
        head = network.get_classifier()
        head = head[0] if isinstance(head, (tuple, list)) else head
        return next(path for path, module in network.named_modules() if module is head)
    classes = root.output.shape[-1] if root.output is not None else 0
    for call in reversed(list(root.walk())):
        module = call.module
        if isinstance(module, nn.Linear) and module.out_features == classes:
            return call.path
        if isinstance(module, nn.Conv2d) and module.out_channels == classes:
            return call.path
    return None
