"""Taps: read, or replace, activations inside any network without touching its code.

    taps = attach(network, ("stages", "penultimate"), sample=inputs)
    with taps:
        logits = network(inputs)
    features = taps.collect()          # {"stage1": (B, C, H, W), ..., "penultimate": (B, D)}

Tap names are ``stem``, ``stage1`` ... ``stageN`` from shallow to deep, ``penultimate`` (the pooled
vector that the classifier reads), ``<name>.preactivation`` (what the last rectifier of that stage
reads) and ``<name>.norm`` (the batch normalisation before that rectifier), and ``module:<path>`` or
``input:<path>`` for the output or input of any sub-module. ``stages`` and ``stages.preactivation``
stand for all stages. Features of image networks come as maps ``(B, C, H, W)``; a name that ends in
``.tokens`` asks for tokens ``(B, L, D)`` with the special tokens in front, ``.raw`` for what the
module gave.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdrun.layers.layout import Layout, as_map, as_tokens
from kdrun.layers.tap_points import derive_layout, derive_tap_points, first_tensor

Form = Literal["map", "tokens", "raw"]


@runtime_checkable
class DeclaresTaps(Protocol):
    """A network that says itself where its taps are.

    What an in-place activation reads must be declared as ``input:`` of that activation: of such a
    network only the activations so named are made to work out of place.
    """

    def tap_points(self) -> dict[str, str]:
        """Tap names to locations: ``path`` (that module's output) or ``input:path`` (its input)."""


@runtime_checkable
class DeclaresLayout(Protocol):
    """A network that says itself how it lays out its stage features."""

    def tap_layout(self) -> Layout:
        """The layout of every stage feature."""


def tap_points(network: nn.Module, sample: Any = None) -> dict[str, str]:
    """The named taps of a network and where they are.

    A network that declares its taps is believed. For any other, one forward of ``sample`` in
    evaluation mode shows where the resolution changes and what the classifier reads.

    Args:
        network: any classifier.
        sample: an input batch; needed only by networks that do not declare their taps.

    Returns:
        Tap names to locations: ``path`` is the output of that sub-module, ``input:path`` its input.

    Raises:
        ValueError: the network declares no taps and no sample was given.
    """
    if isinstance(network, DeclaresTaps):
        return network.tap_points()
    return derive_tap_points(network, sample)


def tap_layout(network: nn.Module) -> Layout | None:
    """How a network lays out its stage features; None where nothing is known (text, tables)."""
    if isinstance(network, DeclaresLayout):
        return network.tap_layout()
    return derive_layout(network)


def attach(network: nn.Module, names: Iterable[str], sample: Any = None) -> Taps:
    """Place taps in a network.

    Attach before ``torch.compile`` so that the hooks are compiled with the network.

    Args:
        network: the network to observe; nothing changes in what it computes.
        names: what to record; see the head of this module.
        sample: an input batch; needed only by networks that do not declare their taps.

    Raises:
        ValueError: an unknown name; the message lists those that exist.
    """
    return Taps(network, _parse(network, names, sample), tap_layout(network))


def replace(
    network: nn.Module, location: str, function: Callable[[Tensor], Tensor]
) -> RemovableHandle:
    """Let ``function`` replace the output (or ``input:<path>``) of a sub-module on every forward.

    The handle is a context manager: ``with replace(network, "layer3", edit): ...`` leaves nothing
    behind. Of a module that gives a tuple the first tensor is replaced and the rest kept.

    Args:
        network: the network to intervene in.
        location: path of the sub-module, or ``input:<path>``.
        function: reads the tensor and returns the one to go on with.

    Raises:
        ValueError: no such sub-module.
    """
    reads_input, path = _split_location(location)
    module = _submodule(network, path)
    if reads_input:
        return module.register_forward_pre_hook(
            lambda _, arguments: _with_first(arguments, function(_first_tensor(arguments)))
        )
    return module.register_forward_hook(
        lambda _, __, output: _with_first(output, function(_first_tensor(output)))
    )


class Taps:
    """Hooks in a network that record while ``with taps:`` is open (see ``attach``)."""

    def __init__(self, network: nn.Module, taps: list[_Tap], layout: Layout | None) -> None:
        self.names = tuple(tap.name for tap in taps)
        self.layout = layout
        self._taps = taps
        self._recorded: dict[str, Tensor] = {}
        self._active = False
        self._handles = [self._hook(network, tap) for tap in taps]
        # An activation that works in place would overwrite what a tap has recorded.
        self._made_out_of_place = _forbid_inplace(_threats(network, taps))

    def placed_in(self, network: nn.Module) -> Taps:
        """The same taps in another network of the same architecture."""
        return Taps(network, self._taps, self.layout)

    def _hook(self, network: nn.Module, tap: _Tap) -> RemovableHandle:
        module = _submodule(network, tap.path)
        name = tap.name

        def record_output(_: nn.Module, __: Any, output: Any) -> None:
            if self._active:
                self._recorded[name] = _first_tensor(output)

        def record_input(_: nn.Module, arguments: tuple, named: dict) -> None:
            if self._active:
                self._recorded[name] = _first_tensor(arguments or named)

        if tap.reads_input:
            return module.register_forward_pre_hook(record_input, with_kwargs=True)
        return module.register_forward_hook(record_output)

    def __enter__(self) -> Taps:
        self._recorded = {}
        self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False

    def collect(self) -> dict[str, Tensor]:
        """Hand over, and forget, the features of the last forward, in the order they were asked.

        Raises:
            RuntimeError: a tapped sub-module did not run.
        """
        recorded, self._recorded = self._recorded, {}
        silent = [tap for tap in self._taps if tap.name not in recorded]
        if silent:
            raise RuntimeError(
                f"tap {silent[0].name}: module {silent[0].path} did not run in the last forward"
            )
        return {tap.name: self._formed(recorded[tap.name], tap) for tap in self._taps}

    def _formed(self, feature: Tensor, tap: _Tap) -> Tensor:
        if tap.form == "raw":
            return feature
        if tap.name == "penultimate":
            if feature.ndim != 4:
                return feature
            return as_map(feature, self.layout or Layout()).mean((2, 3))
        if self.layout is None or feature.ndim < 3:
            return feature
        return (as_map if tap.form == "map" else as_tokens)(feature, self.layout)

    def remove(self) -> None:
        """Take every hook out; the network is as it was before ``attach``."""
        for handle in self._handles:
            handle.remove()
        for module in self._made_out_of_place:
            module.inplace = True
        self._handles, self._made_out_of_place = [], []
        self._recorded = {}


@dataclass(frozen=True, slots=True)
class _Tap:
    name: str
    path: str
    reads_input: bool
    form: Form
    is_declared: bool


def _parse(network: nn.Module, names: Iterable[str], sample: Any) -> list[_Tap]:
    names = list(names)
    taps: dict[str, _Tap] = {}
    points = tap_points(network, sample) if any(map(_is_named, names)) else {}
    for asked in names:
        name, form = asked, "map"
        if not _is_named(asked):
            form = "raw"
        elif asked.rpartition(".")[2] in ("map", "tokens", "raw"):
            name, _, form = asked.rpartition(".")
        for single in _expand(name, points):
            location = _locate(single, points)
            reads_input, path = _split_location(location)
            tap = _Tap(single, path, reads_input, form, is_declared=_is_named(single))
            if taps.setdefault(single, tap) != tap:
                raise ValueError(
                    f"tap {single} is asked for both as {taps[single].form} and {form}"
                )
    return list(taps.values())


def _is_named(name: str) -> bool:
    return not name.startswith(("module:", "input:"))


def _expand(name: str, points: Mapping[str, str]) -> list[str]:
    """``stages`` and ``stages.<suffix>`` to one name per stage, shallow to deep."""
    if name.split(".")[0] != "stages":
        return [name]
    suffix = name.removeprefix("stages")
    stages = [point for point in points if point.startswith("stage") and point[5:].isdigit()]
    if not stages:
        raise ValueError(f"tap stages: this network has no stages; it has {', '.join(points)}")
    return [stage + suffix for stage in sorted(stages, key=lambda stage: int(stage[5:]))]


def _locate(name: str, points: Mapping[str, str]) -> str:
    if not _is_named(name):
        return name.removeprefix("module:")
    if name not in points:
        near = difflib.get_close_matches(name, points, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"no tap {name}{hint}; this network has {', '.join(points)}, "
            "and module:<path> or input:<path> of any sub-module"
        )
    return points[name]


def _split_location(location: str) -> tuple[bool, str]:
    return location.startswith("input:"), location.removeprefix("input:")


def _submodule(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError:
        paths = [name for name, _ in network.named_modules() if name]
        near = difflib.get_close_matches(path, paths, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"no sub-module {path} in {type(network).__name__}{hint}") from None


def _first_tensor(value: Any) -> Tensor:
    """The tensor that a module gives or reads, alone or first in a tuple or mapping.

    Raises:
        ValueError: there is none.
    """
    tensor = first_tensor(value)
    if tensor is None:
        raise ValueError(f"a tapped module reads or gives no tensor but a {type(value).__name__}")
    return tensor


def _with_first(value: Any, tensor: Tensor) -> Any:
    """``value`` with its first tensor replaced."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"the replacing function must return a tensor, not {type(tensor).__name__}")
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, Mapping):
        first = next(iter(value))
        return type(value)({**value, first: tensor})
    return type(value)([tensor, *value[1:]])


def _threats(network: nn.Module, taps: list[_Tap]) -> Iterable[nn.Module]:
    """Modules that would change a tapped activation if they work in place."""
    if isinstance(network, DeclaresTaps) and all(tap.is_declared for tap in taps):
        return [_submodule(network, tap.path) for tap in taps if tap.reads_input]
    return network.modules() if taps else []


def _forbid_inplace(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Make in-place activations work out of place; returns those that were changed."""
    changed = [module for module in modules if getattr(module, "inplace", False) is True]
    for module in changed:
        module.inplace = False
    return changed
