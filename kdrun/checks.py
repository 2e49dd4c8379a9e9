"""Values against the constructors they are for and against kdrun's own schema; no torch."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from kdrun import schema
from kdrun.catalogue import GROUPS, is_group, is_network, listing, nearest
from kdrun.parameters import Parameter, complaint, describe
from kdrun.targets import KEY, is_allowed, is_defined, refusal, signature_of

SUPPLIED = (
    *("num_classes", "in_channels", "input_shape", "image_size", "label_smoothing"),
    *("prompts", "input_mean", "input_std"),
    *("params", "save_dir", "name", "version", "run_name", "tracking_uri"),
)
"""Constructor arguments that kdrun fills in where the config has none or null."""

OF_ROLES = frozenset({*schema.fields_of(schema.Teacher), *schema.fields_of(schema.Student)})
"""Options of a network that say what it is for; networks are not built with them."""

MISSING = "???"


def check(values: dict[str, Any], names: Mapping[str, str], packages: list[str]) -> list[str]:
    """Everything that is wrong with a composed config, one line each.

    Whole numbers given for an option that is a ``float`` are made floats in ``values``, so that 4
    and 4.0 are the same experiment.

    Args:
        values: the composed config, resolved.
        names: the choice in each group, for messages.
        packages: top-level packages that targets may come from besides the usual ones.
    """
    return list(_Checker(names, packages).run(values))


class _Checker:
    def __init__(self, names: Mapping[str, str], packages: list[str]) -> None:
        self.names, self.packages = names, packages

    def run(self, values: dict[str, Any]) -> Iterator[str]:
        plain = {key: value for key, value in values.items() if not is_group(key)}
        further = (key for key in values if is_group(key) and key not in GROUPS)
        yield from self.section(plain, "", schema.Root)
        values |= plain
        for group in (*GROUPS, *further):
            if isinstance(values.get(group), dict):
                yield from self.mapping(values[group], group)
            else:
                yield f"{group}: must be a mapping, got {values.get(group)}"

    def mapping(self, node: dict[str, Any], place: str) -> Iterator[str]:
        """A section with a schema, a node with a target, or a mapping of such."""
        if place in schema.SECTIONS:
            yield from self.section(node, place, schema.SECTIONS[place])
        elif KEY in node or schema.beside_arguments(place):
            yield from self.node(node, place)
        else:
            yield from self.nested(node, place)

    def nested(self, node: Mapping[str, Any], place: str) -> Iterator[str]:
        """Nodes further down."""
        for key, value in node.items():
            items = value if isinstance(value, list) else [value]
            for item in items:
                if isinstance(item, dict):
                    yield from self.mapping(item, f"{place}.{key}")
                elif item == MISSING:
                    yield f"{place}.{key}: must be given"

    def section(self, node: dict[str, Any], place: str, kind: type) -> Iterator[str]:
        """A mapping whose keys are exactly the fields of a dataclass."""
        fields = schema.fields_of(kind)
        prefix = f"{place}." if place else ""
        for key in node:
            if key not in fields:
                yield unknown_option(f"{prefix}{key}", fields, self.owner(place))
        for key, annotation in fields.items():
            if key not in node:
                yield f"{prefix}{key}: is missing ({describe(annotation)})"
                continue
            yield from self.value(node, key, annotation, f"{prefix}{key}")
        inside = {key: value for key, value in node.items() if isinstance(value, (dict, list))}
        yield from self.nested(inside, place)

    def node(self, node: dict[str, Any], place: str) -> Iterator[str]:
        """A mapping with ``_target_`` and the arguments of what that names."""
        kind = schema.beside_arguments(place)
        beside = schema.fields_of(kind) if kind else {}
        required_beside = place == "logger" or is_network(place)
        arguments: Mapping[str, Parameter] | None = {}
        if KEY in node:
            target = node[KEY]
            reason = refusal(target, self.packages)
            if not reason and is_allowed(target, ()) and target.startswith("kdrun."):
                reason = None if is_defined(target) else f"{target}: no such class or function"
            if reason:
                yield f"{place}.{KEY}: {reason}"
                return
            signature = signature_of(target)
            open_ended = signature is None or signature.takes_any_keyword
            arguments = signature.parameters if signature else None
            if arguments and not required_beside:
                beside = {key: kind for key, kind in beside.items() if key in arguments}
        elif place != "logger":
            yield f"{place}: has no {KEY}"
            return
        else:
            open_ended = False
        known = {**beside, **(arguments or {})}
        offered = [key for key in known if key != "params"]
        for key in list(node):
            if key == KEY:
                continue
            if key not in known:
                if not open_ended:
                    yield unknown_option(f"{place}.{key}", offered, self.owner(place, node))
                continue
            if is_network(place) and key in OF_ROLES and key not in beside:
                yield (
                    f"{place}.{key}: teachers have an option of this name, which no network is "
                    f"built with; rename the argument of {self.owner(place, node)}"
                )
                continue
            if key in beside:
                yield from self.value(node, key, beside[key], f"{place}.{key}")
            if arguments and key in arguments and not (key in SUPPLIED and node[key] is None):
                yield from self.value(node, key, arguments[key].annotation, f"{place}.{key}")
        if required_beside:
            for key in beside:
                if key not in node:
                    yield f"{place}.{key}: is missing ({describe(beside[key])})"
        for name, parameter in (arguments or {}).items():
            if parameter.required and name not in node and name not in SUPPLIED:
                wanted = describe(parameter.annotation)
                yield f"{place}.{name}: {self.owner(place, node)} needs it ({wanted})"
        inside = {key: value for key, value in node.items() if isinstance(value, (dict, list))}
        yield from self.nested(inside, place)

    def value(self, node: dict[str, Any], key: str, annotation: Any, place: str) -> Iterator[str]:
        value = node[key]
        if value == MISSING:
            yield f"{place}: must be given ({describe(annotation)})"
            return
        # A nested node becomes the object it describes; its own arguments are checked.
        if isinstance(value, dict) and KEY in value:
            return
        reason = complaint(value, annotation)
        if reason:
            yield f"{place}: {reason}"
        else:
            node[key] = as_float(value, annotation)

    def owner(self, place: str, node: Mapping[str, Any] | None = None) -> str:
        """What the options at ``place`` belong to, as the user knows it."""
        group, _, rest = place.partition(".")
        if node and KEY in node and (rest or group not in self.names):
            return str(node[KEY]).rpartition(".")[2]
        return self.names.get(group, place) if not rest else place


def as_float(value: Any, annotation: Any) -> Any:
    """``value`` as a float where the annotation says so and it is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    options = get_args(annotation) if _is_union(annotation) else (annotation,)
    bases = [get_args(o)[0] if get_origin(o) is Annotated else o for o in options]
    return float(value) if float in bases and int not in bases else value


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def unknown_option(
    place: str, options: Iterable[str], owner: str = "", elsewhere: str | None = None
) -> str:
    """The line for an option that does not exist, with the nearest one that does.

    Args:
        place: the dotted key.
        options: names that exist beside it.
        owner: what they are the options of.
        elsewhere: a dotted key elsewhere in the config that may be meant.
    """
    prefix, dot, last = place.rpartition(".")
    options = list(options)
    meant = nearest(last, options)
    suggestion = f"{prefix}{dot}{meant}" if meant else elsewhere
    hint = f" Did you mean {suggestion}?" if suggestion else ""
    shown = listing(options) if options else "none"
    return f"{place}: no such option{f' of {owner}' if owner else ''}.{hint} (options: {shown})"
