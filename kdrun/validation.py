"""The deep part of ``kdrun validate``: everything is built and fitted together, nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kdrun.artefacts import is_complete
from kdrun.assembly import (
    STUDENT,
    Assembly,
    assemble,
    build_untrained,
    load_init,
    make_method,
    moved,
    sample_batch,
)
from kdrun.checkpoints import load_weights
from kdrun.data.batches import described
from kdrun.data.module import DataModule
from kdrun.errors import ConfigErrors, UserError
from kdrun.evaluation import parameter_count
from kdrun.experiment import prepare_data, stages_of
from kdrun.fit import make_trainer
from kdrun.identity import run_directory
from kdrun.loggers import check_logger
from kdrun.optimization import make_optimizer, make_scheduler
from kdrun.sizes import in_words
from kdrun.stages.recorded import refuse_unrecordable
from kdrun.stages.train import existing_file, is_trained_here
from kdrun.stages.training import training_settings
from kdrun.tasks.task import Task

LARGEST_BUILT = 500_000_000
"""Parameters of all networks together above which only their shapes are computed."""


def check(config: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Check that a valid configuration can be run: data, networks, method, optimisers, weights.

    The data set is opened, every network built and run once on two samples; no weights are fetched
    and nothing is trained.

    Args:
        config: composed, resolved and valid by itself.
        names: the choice made in each config group.

    Returns:
        What the run will be, one line each: data, networks, steps, memory, directory.

    Raises:
        ConfigErrors: everything that stands against it, one line each.
    """
    problems: list[str] = []
    with _noting(problems):
        stages_of(config)
    with _noting(problems):
        check_logger(config["logger"])
    with _noting(problems):
        make_trainer(config["trainer"], epochs=1)
    for role in ("student", "teacher"):
        with _noting(problems):
            optimizer_states(training_settings(config, role))
    method = data = None
    with _noting(problems):
        method = make_method(config["method"])
    with _noting(problems):
        data, task = prepare_data(config)
    if method is None or data is None:
        raise ConfigErrors(problems)
    with _noting(problems):
        for stage in stages_of(config).values():
            stage.check(config, data)
    roles = {STUDENT: "student", **method.roles()}
    for source in set(roles.values()) - set(config):
        problems.append(f"{config['method']['_target_']} needs a {source}: give {source}=<model>")
    roles = {role: source for role, source in roles.items() if source in config}
    device = "meta" if _parameters(config, roles, data) > LARGEST_BUILT else "cpu"
    networks: dict[str, nn.Module] = {}
    reports: list[str] = []
    for role, source in roles.items():
        with _noting(problems), _place(device):
            networks[role] = build_untrained(config[source], data, config["seed"])
            if role not in method.trainable_roles:
                reports += _read_weights(networks[role], config[source], source)
    if problems:
        raise ConfigErrors(problems)
    others = {role: network for role, network in networks.items() if role != STUDENT}
    counts = {role: parameter_count(network) for role, network in networks.items()}
    fitting = {"task": task, "data": data, "seed": config["seed"], "device": device}
    with _noting(problems), _place(device):
        assembly = assemble(method, networks[STUDENT], others, **fitting)
    if problems:
        raise ConfigErrors(problems)
    if config["teacher"]["cache"] != "none":
        refuse_unrecordable(config["teacher"], method, data.num_classes)
    directory = run_directory(config, names)
    state = "finished" if is_complete(directory) else "not finished"
    return [
        _data_line(names, data),
        *(_network_line(config, names, roles, role, count) for role, count in counts.items()),
        *reports,
        *_training_lines(config, assembly, task, data, device),
        _line("run", f"{directory} ({state})"),
    ]


def optimizer_states(settings: Mapping[str, Any]) -> int:
    """Numbers that the optimiser keeps for each parameter, found by one step of it.

    Args:
        settings: the ``training`` group as it holds for a role.

    Raises:
        UserError: the optimiser or its schedule cannot be made.
    """
    parameter = nn.Parameter(torch.zeros(8))
    optimizer = make_optimizer(settings["optimizer"], [parameter])
    try:
        make_scheduler(settings["scheduler"], optimizer, settings["epochs"], steps_per_epoch=10)
    except ValueError as error:
        raise UserError(f"{settings['scheduler']['name']} schedule: {error}") from error
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(isinstance(value, Tensor) and value.shape == parameter.shape for value in state)


def activation_bytes(
    assembly: Assembly, task: Task, data: DataModule, device: str = "cpu"
) -> float:
    """Bytes per sample that the trained networks keep for the backward pass."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        # Held until all are counted, so that no other storage comes to lie in the same place.
        kept[_storage(tensor)] = tensor
        return tensor

    batch = moved(sample_batch(data), device)
    networks = _trained(assembly)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = [task.forward(network.train(), batch) for network in networks]
    parameters = {_storage(p) for network in networks for p in network.parameters()}
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in kept.items()}
    del outputs
    return sum(size for key, size in sizes.items() if key not in parameters) / len(batch)


# -- parts -----------------------------------------------------------------------------------------


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def _place(device: str) -> Any:
    return torch.device(device) if device == "meta" else nullcontext()


def _parameters(config: Mapping[str, Any], roles: Mapping[str, str], data: DataModule) -> int:
    """Parameters of all networks that can be built without numbers."""
    count = 0
    for source in roles.values():
        try:
            with torch.device("meta"):
                count += parameter_count(build_untrained(config[source], data, config["seed"]))
        except (UserError, RuntimeError):
            continue  # Some constructors compute; building it for real will tell what is wrong.
    return count


def _read_weights(network: nn.Module, node: Mapping[str, Any], source: str) -> list[str]:
    if node.get("checkpoint"):
        option, load = "checkpoint", load_weights
    elif node.get("init_from"):
        option, load = "init_from", load_init
    else:
        return []
    path = existing_file(node[option], f"{source}.{option}")
    return [_line("weights", f"{source}.{option}: {load(network, str(path))}")]


def _trained(assembly: Assembly) -> list[nn.Module]:
    roles = assembly.method.trainable_roles
    return [assembly.student, *(assembly.teachers[role] for role in roles)]


def _storage(tensor: Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- lines -----------------------------------------------------------------------------------------


def _line(title: str, text: str) -> str:
    return f"{title:<10} {text}"


def _data_line(names: Mapping[str, str], data: DataModule) -> str:
    labels = "" if data.labelled_size == data.train_size else f" ({data.labelled_size:,} labelled)"
    sizes = f"{data.train_size:,} train{labels}, {data.validation_size:,} validation"
    samples = f"{sizes}, {data.test_size:,} test samples of {described(data.input_shape)}"
    text = f"{names['dataset']}, {samples}, {data.num_classes} classes"
    return _line("data", text)


def _network_line(
    config: Mapping[str, Any],
    names: Mapping[str, str],
    roles: Mapping[str, str],
    role: str,
    count: int,
) -> str:
    source = roles[role]
    node = config[source]
    given = f"weights of {node['checkpoint']}" if node.get("checkpoint") else "pretrained weights"
    origin = "trained here" if source == "student" or is_trained_here(node) else given
    return _line(role, f"{names.get(source, source)}, {count:,} parameters, {origin}")


def _training_lines(
    config: Mapping[str, Any], assembly: Assembly, task: Task, data: DataModule, device: str
) -> list[str]:
    method, trainer = assembly.method, config["trainer"]
    settings = training_settings(config, "student")
    batch_size, epochs = min(settings["batch_size"], data.train_size), settings["epochs"]
    steps = data.batches(batch_size)
    learned = sum(map(_bytes, (*_trained(assembly), method)))
    # Samples that one process runs at once; half precision halves what they keep.
    samples = batch_size / (trainer["devices"] * trainer["num_nodes"] * trainer["accumulate"])
    samples *= 0.5 if trainer["precision"] == "bf16" else 1.0
    sizes = {
        "networks": sum(map(_bytes, (assembly.student, *assembly.teachers.values(), method))),
        "gradients and optimiser": learned * (1 + optimizer_states(settings)),
        "activations": samples * activation_bytes(assembly, task, data, device),
    }
    listed = ", ".join(f"{name} {in_words(size)}" for name, size in sizes.items())
    total = in_words(sum(sizes.values()))
    lines = [
        _line("steps", f"{steps:,} an epoch, {steps * epochs:,} in all, batches of {batch_size}"),
        _line("memory", f"about {total} ({listed}), besides data and Python"),
    ]
    added = parameter_count(method)
    if added:
        lines.insert(0, _line("method", f"{type(method).__name__} adds {added:,} parameters"))
    return lines
