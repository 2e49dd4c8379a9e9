"""From a config to networks, method and data that fit together, checked before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kdrun.build import instantiate
from kdrun.checkpoints import load_weights
from kdrun.data.module import DataModule
from kdrun.errors import UserError
from kdrun.layers.taps import Taps, attach
from kdrun.method import Method
from kdrun.models import build_model
from kdrun.outputs import Batch, HeadLogits, ModelOutput
from kdrun.tasks.task import Task

STUDENT = "student"


@dataclass
class Assembly:
    """Everything a training needs, on the CPU: the method is set up for these very networks."""

    method: Method
    student: nn.Module
    teachers: dict[str, nn.Module] = field(default_factory=dict)
    taps: dict[str, Taps] = field(default_factory=dict)

    def deployed(self) -> nn.Module:
        """The student as evaluated and shipped."""
        return self.method.deploy(self.student)


def build_network(node: Mapping[str, Any], data: DataModule, seed: int) -> nn.Module:
    """A freshly initialised network of a ``model`` config node, the same for the same seed."""
    torch.manual_seed(seed)
    scale = data.preprocessing.normalisation
    also: dict[str, Callable[[], Any]] = {"prompts": lambda: data.prompts}
    if scale is not None:
        also |= {"input_mean": lambda: list(scale.mean), "input_std": lambda: list(scale.std)}
    return build_model(
        dict(node), num_classes=data.num_classes, input_shape=data.input_shape, also=also
    )


def assemble(
    method: Method,
    student: nn.Module,
    teachers: Mapping[str, nn.Module],
    *,
    task: Task,
    data: DataModule,
    seed: int,
    device: str = "cpu",
) -> Assembly:
    """Wrap the student, place the taps, run every network once, and set the method up.

    Args:
        method: a fresh method.
        student: the network to train.
        teachers: the other networks by role.
        task: how networks read a batch.
        data: gives a sample batch and the number of classes.
        seed: initialises what the method adds.
        device: where the networks are; ``meta`` for shapes without numbers.

    Raises:
        UserError: a method for other tasks, or networks that cannot work together, naming both and
            the shapes.
    """
    if method.tasks and task.name not in method.tasks:
        raise UserError(
            f"{type(method).__name__} is made for {', '.join(method.tasks)}, not for {task.name}"
        )
    torch.manual_seed(seed)
    method.supervised_loss = task.supervised_loss
    batch = moved(sample_batch(data, method.views), device)
    given = batch.inputs if isinstance(batch.inputs, Mapping) else {}
    for name in method.needs:
        if name not in given:
            raise UserError(
                f"{type(method).__name__} reads {name} of each batch, and a batch of this data set "
                f"has {', '.join(given) or 'one input without a name'}; choose another dataset"
            )
    try:
        teachers = method.wrap_teachers(teachers, batch.inputs)
        student = method.wrap(student, teachers, batch.inputs)
    except ValueError as error:
        raise UserError(f"{type(method).__name__}: {error}") from error
    networks = {STUDENT: student, **teachers}
    taps: dict[str, Taps] = {}
    for role, names in method.taps().items():
        if role not in networks:
            raise UserError(f"{type(method).__name__} taps {role}, but no network plays that role")
        if names:
            try:
                taps[role] = attach(networks[role], names, sample=batch.inputs)
            except ValueError as error:
                raise UserError(f"{role}: {error}") from error
    outputs = {
        role: _dry_forward(role, network, batch, taps.get(role), task)
        for role, network in networks.items()
    }
    _check_widths(outputs, data)
    if isinstance(outputs[STUDENT].logits, HeadLogits) and not method.lazy_logits:
        raise UserError(
            f"{type(method).__name__} reads all logits at once; set task.chunk=null for it"
        )
    others = {role: output for role, output in outputs.items() if role != STUDENT}
    try:
        method.setup(outputs[STUDENT], others)
    except ValueError as error:
        raise UserError(f"{type(method).__name__}: {error}") from error
    return Assembly(method, student, dict(teachers), taps)


def assemble_untrained(config: Mapping[str, Any], data: DataModule, task: Task) -> Assembly:
    """The method and all networks of a configuration, whatever weights they will have.

    For what asks only how they are built: checks, and a deployed student about to get its weights.
    Nothing is trained, read or fetched.
    """
    method = make_method(config["method"])
    student = build_untrained(config["student"], data, config["seed"])
    teachers = {
        role: build_untrained(config[source], data, config["seed"])
        for role, source in method.roles().items()
    }
    return assemble(method, student, teachers, task=task, data=data, seed=config["seed"])


def build_untrained(node: Mapping[str, Any], data: DataModule, seed: int) -> nn.Module:
    """``build_network`` without a library's pretrained weights."""
    if "pretrained" in node:
        node = {**node, "pretrained": False}
    return build_network(node, data, seed)


def sample_batch(
    data: DataModule, views: tuple[str, ...] = (), dtype: torch.dtype = torch.float32
) -> Batch:
    """Two training samples on the CPU, not augmented; all of a data set with a single batch."""
    cpu = torch.device("cpu")
    with cpu:  # Also where networks are being built without numbers.
        loader = data.train(
            batch_size=2,
            seed=0,
            device=cpu,
            views=views,
            augment=False,
            shuffle=False,
            dtype=dtype,
        )
        return next(iter(loader))


def moved(batch: Batch, device: str) -> Batch:
    """The batch on another device."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: move(item) for name, item in value.items()}
        return value if value is None else value.to(device)

    return Batch(
        move(batch.inputs),
        move(batch.target),
        move(batch.index),
        move(batch.mask),
        move(batch.views),
        batch.augmentation,
        None if batch.unlabelled is None else moved(batch.unlabelled, device),
    )


def _dry_forward(
    role: str, network: nn.Module, batch: Batch, taps: Taps | None, task: Task
) -> ModelOutput:
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            if taps is None:
                output = task.forward(network, batch)
            else:
                with taps:
                    output = task.forward(network, batch)
                output.features.update(taps.collect())
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        shape = tuple(batch.inputs.shape) if isinstance(batch.inputs, torch.Tensor) else "a dict"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{role} ({type(network).__name__}) cannot read this data set's inputs "
            f"of shape {shape}: {reason}"
        ) from error
    finally:
        network.train(was_training)
    return output


def _check_widths(outputs: Mapping[str, ModelOutput], data: DataModule) -> None:
    for role, output in outputs.items():
        width = output.logits.shape[-1]
        if width != data.num_classes:
            raise UserError(
                f"{role} gives {width} logits but the data set has {data.num_classes} classes; "
                f"set {role}.num_classes={data.num_classes} or choose another {role}"
            )


def load_init(network: nn.Module, path: str) -> str:
    """Start a network from ``student.init_from``; returns the report of what was loaded."""
    return str(load_weights(network, path, partial=True))


def with_batch_statistics(network: nn.Module) -> nn.Module:
    """A copy whose batch normalisation uses the statistics of each batch (``mode: batch_stats``).

    Its running statistics are dropped, so they cannot drift and the copy stays constant.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return network


def make_method(node: Mapping[str, Any]) -> Method:
    """The method of the ``method`` config group.

    Raises:
        UserError: the target is not a ``Method``, or a value is out of range.
    """
    method = instantiate(dict(node))
    if not isinstance(method, Method):
        raise UserError(f"method: {node['_target_']} is not a kdrun.method.Method")
    return method
