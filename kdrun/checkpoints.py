"""Weights on disk: reading them from any common kind of file, and writing safetensors."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kdrun.errors import UserError
from kdrun.files import atomic_file

NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "student", "weights")
"""Keys under which training programs put the weights beside epoch and optimiser."""

PREFIXES = ("", "model.", "student.", "network.", "net.", "networks.student.", "student.model.")
"""What may stand in front of every name, because the network was part of something larger."""

WRAPPERS = ("module", "_orig_mod")
"""Name parts left by DataParallel and torch.compile; they mean nothing."""

NOTED = "kdrun."
"""What the names of kdrun's own entries in a file's metadata begin with."""


@runtime_checkable
class HasParameterAliases(Protocol):
    """A network whose parameters have other names in files that are about.

    ``parameter_aliases`` maps a regular expression over their names to the replacement.
    """

    parameter_aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of each tensor when weights were loaded.

    Attributes:
        path: the file.
        loaded: names taken over.
        missing: names of the network that the file lacks.
        unexpected: names of the file that the network lacks.
        mismatched: name to its shape in the file and in the network.
    """

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def is_complete(self) -> bool:
        """Every tensor of the file went into the network, and the network lacks none."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        head = f"{len(self.loaded)} of {total} tensors loaded from {self.path}"
        return "; ".join([head, *self.differences()])

    def differences(self) -> list[str]:
        """What did not go over, a phrase for each kind."""
        shapes = [
            f"{name} {theirs} in the file, {ours} in the network"
            for name, (theirs, ours) in self.mismatched.items()
        ]
        groups = {"other shape": shapes, "not in the file": self.missing}
        groups["not in the network"] = self.unexpected
        return [f"{title}: {_some(names)}" for title, names in groups.items() if names]


def load_weights(network: nn.Module, path: str | Path, *, partial: bool = False) -> LoadReport:
    """Load weights into a network, in place.

    Reads safetensors and PyTorch files (``weights_only``: a pickle that would run code is refused),
    bare state dicts and those inside a training checkpoint, with the usual prefixes. The network is
    not touched unless the weights are accepted.

    Args:
        network: the network, whose dtypes and devices stay.
        path: the file.
        partial: take what fits; otherwise every tensor must fit and none be left over.

    Returns:
        What was and was not loaded.

    Raises:
        UserError: no such file, not weights, or weights that do not fit; one line that names the
            first differences. With ``partial``: nothing fits at all.
    """
    path = Path(path).expanduser()
    ours = {name: value for name, value in network.state_dict().items() if _is_tensor(value)}
    aliases = network.parameter_aliases if isinstance(network, HasParameterAliases) else {}
    theirs = _rename(read_weights(path), ours, aliases)
    fitting = {name for name in theirs if name in ours and theirs[name].shape == ours[name].shape}
    report = LoadReport(
        path=path,
        loaded=tuple(name for name in ours if name in fitting),
        # Files from before PyTorch 0.4.1 have no counters, and nothing here reads them.
        missing=tuple(name for name in ours if name not in theirs and not _is_counter(name)),
        unexpected=tuple(name for name in theirs if name not in ours),
        mismatched={
            name: (tuple(theirs[name].shape), tuple(ours[name].shape))
            for name in theirs
            if name in ours and name not in fitting
        },
    )
    kind = type(network).__name__
    if partial and all(map(_is_counter, report.loaded)):
        raise UserError(f"{path}: no tensor fits {kind}; " + "; ".join(report.differences()))
    if not partial and not report.is_complete:
        raise UserError(f"{path} does not fit {kind}: " + "; ".join(report.differences()))
    network.load_state_dict({name: theirs[name] for name in fitting}, strict=False)
    return report


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file or training checkpoint by name, on the CPU.

    Raises:
        UserError: no such file, a damaged one, one that needs code to be read, or one without
            weights.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: damaged, or not safetensors ({_line(error)})") from error
    try:
        with torch.serialization.safe_globals(_kept_beside_weights()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise UserError(f"{path}: damaged, or not a PyTorch file") from error
        raise UserError(
            f"{path}: holds more than tensors ({named[1]}), and reading it would run its code; "
            "save the bare weights instead: torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, or not a PyTorch file ({_line(error)})") from error
    return _find_state_dict(content, path)


def save_weights(
    network: nn.Module, path: str | Path, trained_on: Mapping[str, str] | None = None
) -> str:
    """Write the weights of a network as safetensors, all or nothing.

    The file is a bare state dict that loads in plain PyTorch; tied tensors are written under each
    of their names.

    Args:
        network: whose weights.
        path: of the file.
        trained_on: what they take for granted of the data, as text by name (``saved_for``).

    Returns:
        SHA-256 of the file.

    Raises:
        UserError: the file cannot be written; an older one stays as it was.
        ValueError: the network keeps state that is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in network.state_dict().items():
        if not _is_tensor(value):
            raise ValueError(f"{name} of {type(network).__name__} is no tensor: cannot be saved")
        value = value.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        tensors[name] = value
    noted = {f"{NOTED}{name}": text for name, text in (trained_on or {}).items()}
    data = _in_order(safetensors.torch.save(tensors, metadata={"format": "pt"} | noted))
    with atomic_file(Path(path)) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def _in_order(data: bytes) -> bytes:
    """The same file with the entries of its metadata sorted.

    safetensors writes them in an order of chance, and equal weights are to be equal files.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors begin at multiples of eight bytes.
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def saved_for(path: Path) -> dict[str, str]:
    """What a weights file says of the data it was made for; empty for files from elsewhere."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, or not safetensors ({_line(error)})") from error
    return {
        name.removeprefix(NOTED): text for name, text in metadata.items() if name.startswith(NOTED)
    }


def _kept_beside_weights() -> list[Any]:
    """Harmless types that training programs save next to the weights: options and numpy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [argparse.Namespace, np.dtype, *dtypes, *((scalar, name) for name in names)]


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        nest = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds no weights but a {type(content).__name__}")
    tensors = {str(name): value for name, value in content.items() if _is_tensor(value)}
    if not tensors:
        raise UserError(
            f"{path}: holds no weights; its entries are {_some(list(map(str, content)))}"
        )
    return tensors


def _rename(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """Names of the file to names of the network: the prefix under which most of them are known."""

    parts_of_ours = {part for name in ours for part in name.split(".")}
    meaningless = set(WRAPPERS) - parts_of_ours

    def under(prefix: str) -> dict[str, Tensor]:
        named = {}
        for name, value in theirs.items():
            name = ".".join(part for part in name.split(".") if part not in meaningless)
            if not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix)
            for pattern, replacement in aliases.items():
                name = name if name in ours else re.sub(pattern, replacement, name)
            named[name] = value
        return named

    return max(map(under, PREFIXES), key=lambda named: len(named.keys() & ours.keys()))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _some(names: Sequence[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
