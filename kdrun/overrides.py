"""What was typed: ``key=value`` words, read with Hydra's grammar."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kdrun import schema
from kdrun.catalogue import SWEEP_GROUPS, Catalogue, is_group, is_network
from kdrun.errors import UserError
from kdrun.targets import is_dotted_path

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override as Parsed

_KEY = re.compile(r"[A-Za-z_][\w@/-]*(\.[\w-]+)*")

EXTERNAL = ("timm", "torchvision", "hf")
"""Configs in ``conf/model`` whose ``name`` is the rest of what was typed: ``timm/<name>``."""

CUSTOM = "custom"
"""The config in ``conf/model`` for a class of the user's own, given by its dotted path."""


@dataclass(frozen=True)
class Override:
    """One typed word.

    Attributes:
        key: dotted place in the config, or a config group.
        value: the parsed value; for a group the name of its choice. None where ``values`` is set.
        word: what was typed.
        values: of a sweep over several values, each as text; empty otherwise.
        interval: whether ``values`` are the two ends of a continuous range.
    """

    key: str
    value: Any
    word: str
    values: tuple[str, ...] = ()
    interval: bool = False

    @property
    def is_choice(self) -> bool:
        """Whether it chooses a config of a group."""
        return is_group(self.key)

    @property
    def is_sweep(self) -> bool:
        """Whether it stands for several values."""
        return bool(self.values)


def parse(words: Iterable[str], catalogue: Catalogue) -> tuple[list[Override], list[str]]:
    """Read typed words.

    Returns:
        The overrides that could be read, and a line for each word that could not.
    """
    overrides: dict[str, Override] = {}
    problems = []
    for word in words:
        try:
            override = parse_word(word, catalogue)
        except UserError as error:
            problems.append(str(error))
            continue
        if override.key in overrides:
            problems.append(f"{override.key}: given twice ({overrides[override.key].word}, {word})")
            continue
        overrides[override.key] = override
    return list(overrides.values()), problems


def parse_word(word: str, catalogue: Catalogue) -> Override:
    """Read one word.

    Raises:
        UserError: it is not ``key=value`` with a value that the grammar knows.
    """
    key, equals, text = word.partition("=")
    if word.startswith("-"):
        raise UserError(f"{word}: no such flag (flags: --help, --version, --config-dir DIR, -m)")
    if key.startswith("~"):
        raise UserError(
            f"{word}: nothing can be taken out of a config; where null is allowed, "
            f"write {key[1:]}=null"
        )
    if not equals:
        raise UserError(f"{word}: '=' is missing; options are written key=value")
    # `+` adds what is not there, which kdrun has no use for: with and without it is the same.
    key = key.lstrip("+").removeprefix("model@")
    if not _KEY.fullmatch(key):
        raise UserError(f"{word}: {key or 'the part before ='} is not a key")
    if key.split(".")[0].split("/")[0] in (*SWEEP_GROUPS, "hydra", "fail_fast", "objectives"):
        raise UserError(f"{word}: is a setting of many runs; it goes with -m (kdrun -m ...)")
    parsed = _parse(word, key, text)
    if parsed.is_sweep_override():
        values, interval = _values(parsed, key, catalogue)
        return Override(key, None, word, tuple(values), interval)
    value = parsed.value()
    if is_group(key):
        if isinstance(value, (dict, list)):
            raise UserError(
                f"{word}: names one of the {key} configs; set its options as {key}.x=..."
            )
        value = value if isinstance(value, str) else text
    return Override(key, value, word)


def _parse(word: str, key: str, text: str) -> Parsed:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"{key}={text}")
    except (HydraException, ValueError, RecursionError):
        # Besides what the grammar does not know: numbers of thousands of digits, hundreds of
        # brackets.
        raise UserError(
            f"{word}: {text} cannot be read; quote text with special characters: {key}='\"...\"'"
        ) from None


def _values(parsed: Parsed, key: str, catalogue: Catalogue) -> tuple[list[str], bool]:
    from hydra.core.override_parser.types import Glob, IntervalSweep

    value = parsed.value()
    if isinstance(value, IntervalSweep):
        if not value.start < value.end:
            raise UserError(f"{parsed.input_line}: an interval goes from a number to a larger one")
        return [repr(value.start), repr(value.end)], True
    if isinstance(parsed._value, Glob):
        if not is_group(key):
            raise UserError(f"{parsed.input_line}: glob() chooses among configs of a group")
        chosen = parsed._value.filter(catalogue.choices(key))
        if not chosen:
            raise UserError(f"{parsed.input_line}: matches no {key}")
        return chosen, False
    found = list(parsed.sweep_string_iterator())
    if not found:
        raise UserError(f"{parsed.input_line}: holds no value")
    return found, False


def network_choice(name: str, choices: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A network as typed to a config of ``conf/model`` and the entries to set in it.

    ``timm/vit_tiny_patch16_224`` is the config ``timm`` with that ``name``; ``package.Class`` is
    the config ``custom`` with that ``_target_``; anything else stands for itself.
    """
    if name in choices:
        return name, {}
    library, slash, rest = name.partition("/")
    if slash and rest and library in EXTERNAL and library in choices:
        return library, {"name": rest}
    if is_dotted_path(name):
        return CUSTOM, {"_target_": name}
    return name, {}


def typed_packages(overrides: Iterable[Override]) -> list[str]:
    """Top-level packages of the dotted paths typed as networks: typing one permits its package."""
    names = [override.value for override in overrides if is_network(override.key)]
    paths = [name for name in names if isinstance(name, str) and is_dotted_path(name)]
    return [path.split(".")[0] for path in paths]


OF_ONE_NETWORK = ("checkpoint", "finetune", "init_from", "allow_other_data")
"""Options of a role that say where the weights of one network come from, and what they may be."""


def merge(layers: Iterable[Sequence[str]]) -> list[str]:
    """Overrides of several layers as one list: later layers win.

    A choice of a group takes the options that earlier layers set in that group away with it, since
    they were meant for another choice. What was said of the teacher or student whichever network it
    is (``teacher.cache``, ``teacher.seed``) stays, but for where its weights come from.
    """
    kept: dict[str, str] = {}
    for layer in layers:
        given = {word.partition("=")[0].lstrip("+").removeprefix("model@"): word for word in layer}
        chosen = {key for key in given if is_group(key)}
        kept = {
            key: word
            for key, word in kept.items()
            if key not in given and (key.split(".")[0] not in chosen or _outlives_a_choice(key))
        }
        kept |= given
    return list(kept.values())


def _outlives_a_choice(key: str) -> bool:
    """Whether an option is kept when its group gets another choice."""
    group, _, option = key.partition(".")
    if not is_network(group):
        return False
    of_the_role = {field.name for field in fields(schema.beside_arguments(group))}
    return option in of_the_role and option not in OF_ONE_NETWORK
