"""Networks as files for other programs: weights alone, a torch.export program, or ONNX."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kdrun.checkpoints import load_weights, save_weights
from kdrun.errors import UserError
from kdrun.outputs import Batch
from kdrun.tasks.task import Task

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "state_dict": (".pt", ".safetensors", ".pth", ".bin"),
    "torch_export": (".pt2",),
    "onnx": (".onnx",),
}
"""The formats, and the endings of their files."""

FORMATS = tuple(SUFFIXES)

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

LARGEST_DIFFERENCE = 1e-4
"""Between logits of the network and of what was written, relative to the largest logit."""


class Logits(nn.Module):
    """A network as a plain function from inputs to logits, whatever it gives by itself."""

    def __init__(self, network: nn.Module, task: Task, batch: Batch) -> None:
        super().__init__()
        self.network = network
        self._task, self._batch = task, batch

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs ``(B, ...)`` to logits ``(B, ..., C)``."""
        batch = Batch(inputs, self._batch.target, self._batch.index)
        return self._task.forward(self.network, batch).logits


def export(network: nn.Module, task: Task, batch: Batch, format: str, path: Path) -> float:
    """Write a network, and check that what was written gives the same logits.

    The first axis of the inputs may have any length in programs. The file takes its place only when
    it has passed the check.

    Args:
        network: in evaluation mode, on the CPU; of any classifier the logits are exported.
        task: how the network reads a batch.
        batch: at least three samples to trace and to check with.
        format: one of ``FORMATS``.
        path: the file to write.

    Returns:
        The largest absolute difference between the logits.

    Raises:
        UserError: the network cannot be traced, its program gives other logits, or the file cannot
            be written.
    """
    if not isinstance(batch.inputs, Tensor):
        raise UserError(f"{type(network).__name__} reads several inputs; only one can be exported")
    program = Logits(network, task, batch).eval()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path.parent}: {error.strerror or error}") from error
    try:
        with torch.no_grad():
            expected = program(batch.inputs)
            written = _WRITERS[format](program, batch.inputs[:2], temporary)
            difference = float((written(batch.inputs) - expected).abs().max())
        scale = max(1.0, float(expected.abs().max()))
        if not difference <= LARGEST_DIFFERENCE * scale:
            raise UserError(
                f"format={format}: {type(network).__name__} gives other logits once exported "
                f"(difference {difference:.2g})"
            )
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.is_file():
            temporary.unlink()
    return difference


def _write_state_dict(program: Logits, inputs: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """The network's own state dict, read back into a copy of it."""
    network = program.network
    if path.suffix == ".safetensors":
        save_weights(network, path)
    else:
        with path.open("wb") as file:  # Opened here, so that a failure says why.
            torch.save(network.state_dict(), file)
    copied = copy.deepcopy(program)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    load_weights(copied.network, path)
    return copied


def _write_torch_export(program: Logits, inputs: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(_trace(program, inputs), path)
    return torch.export.load(path).module()


def _write_onnx(program: Logits, inputs: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"format=onnx needs {', '.join(missing)}: pip install 'kdrun[onnx]'")
    import onnxruntime

    traced = _trace(program, inputs)
    torch.onnx.export(
        traced,
        (inputs,),
        path,
        input_names=["inputs"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)
    return lambda batch: torch.from_numpy(session.run(None, {"inputs": batch.numpy()})[0])


def _trace(program: Logits, inputs: Tensor) -> torch.export.ExportedProgram:
    try:
        shapes = ({0: torch.export.Dim("batch")},)
        return torch.export.export(program, (inputs,), dynamic_shapes=shapes)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{type(program.network).__name__} cannot be traced by torch.export: {reason}"
        ) from error


_WRITERS: Mapping[str, Callable[[Logits, Tensor, Path], Callable[[Tensor], Tensor]]] = {
    "state_dict": _write_state_dict,
    "torch_export": _write_torch_export,
    "onnx": _write_onnx,
}
