"""Stages that train a network on labels alone: the teacher, and the student for reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from kdrun import distributed
from kdrun.assembly import (
    assemble,
    assemble_untrained,
    build_network,
    build_untrained,
    load_init,
    make_method,
)
from kdrun.checkpoints import load_weights, save_weights, saved_for
from kdrun.data.module import DataModule
from kdrun.errors import UserError
from kdrun.files import file_sha256, typed_path, write_json
from kdrun.given_weights import refuse_other_data
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.stages.recorded import refuse_unrecordable
from kdrun.stages.stage import Context, Stage
from kdrun.stages.training import architecture, train, training_key

WEIGHTS = {"last": "network.safetensors", "best": "network_best.safetensors"}
"""Files of a trained network: after the last epoch, and at the best validation result."""


class Supervised(Method):
    """No distillation: the task's own loss."""

    tasks: ClassVar[tuple[str, ...]] = ()
    lazy_logits: ClassVar[bool] = True

    def roles(self) -> Mapping[str, str]:
        """No network but the student."""
        return {}

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss as the only term."""
        return {"supervised": self.supervised_loss(student, batch)}


class TrainTeacher(Stage):
    """The teacher's weights: trained here, or taken from a checkpoint or a library.

    ``teacher.checkpoint`` and ``teacher.pretrained`` give finished weights, which are only checked
    and copied into the store; with ``teacher.finetune`` they are where training starts.

    Args:
        entry: the config entry of the network, after which the stage must be named: ``teacher`` or
            a further network such as ``image_teacher``.
    """

    kind: ClassVar[str] = "network"
    shared: ClassVar[bool] = True

    def __init__(self, *, entry: str = "teacher") -> None:
        self.entry = entry

    def check(self, config: Mapping[str, Any], data: DataModule) -> None:
        """Refuse given weights that were made for other classes or other inputs."""
        if self._is_learned_from(config):
            node = config[self.entry]
            if node["checkpoint"]:
                existing_file(node["checkpoint"], f"{self.entry}.checkpoint")
            refuse_other_data(node, self.entry, data.for_teacher)

    def wanted(self, context: Context) -> bool:
        """Only where the method learns from this network and does not train it itself."""
        return self._is_learned_from(context.config)

    def _is_learned_from(self, config: Mapping[str, Any]) -> bool:
        method = make_method(config["method"])
        frozen = set(method.roles()) - set(method.trainable_roles)
        return self.entry in {method.roles()[role] for role in frozen}

    def key(self, context: Context) -> dict[str, Any]:
        """Architecture, origin of the weights and, if it is trained, everything that matters."""
        node = context.config[self.entry]
        context = replace(context, data=context.data.for_teacher)
        key: dict[str, Any] = {"network": architecture(node)}
        if node["checkpoint"]:
            file = existing_file(node["checkpoint"], f"{self.entry}.checkpoint")
            key["start"] = file_sha256(file)
        if is_trained_here(node):
            key |= training_key(context, self.entry) | {"seed": node["seed"]}
            key |= batch_statistics_key(context, node)
        else:
            # Only the classes decide what such a network looks like.
            key["classes"] = context.data.num_classes
        if "prompts" in node:
            key["prompts"] = context.data.prompts
        return key

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Train, or copy, the teacher."""
        node = context.config[self.entry]
        context = replace(context, data=context.data.for_teacher)
        network = build_network(node, context.data, node["seed"])
        trained_on: dict[str, str] = {}
        if node["checkpoint"]:
            given = existing_file(node["checkpoint"], f"{self.entry}.checkpoint")
            load_weights(network, given)
            # What the file says of its data, not what is at hand here.
            trained_on = saved_for(given)
        if is_trained_here(node):
            train_alone(
                context, network, name, self.entry, node["seed"], self.key(context), directory
            )
        elif distributed.rank() == 0:
            for file in WEIGHTS.values():
                save_weights(network, directory / file, trained_on)
            write_json(directory / "training.json", {"epochs": 0, "seconds": 0.0})


class TrainAlone(Stage):
    """The student trained on labels alone, from the same initial weights: the reference."""

    kind: ClassVar[str] = "network"
    shared: ClassVar[bool] = True

    def key(self, context: Context) -> dict[str, Any]:
        """Architecture, initial weights, seed and everything that matters to training."""
        node = context.config["student"]
        key = {"network": architecture(node)} | training_key(context, "student")
        if node["init_from"]:
            key["start"] = file_sha256(existing_file(node["init_from"], "student.init_from"))
        key |= batch_statistics_key(context, node)
        return key | {"seed": context.config["seed"]}

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Train the student alone."""
        seed = context.config["seed"]
        network = initial_student(context, report=True)
        train_alone(context, network, name, "student", seed, self.key(context), directory)


def batch_statistics_key(context: Context, node: Mapping[str, Any]) -> dict[str, Any]:
    """Into how many parts processes cut a batch, where a network normalises by batches.

    Each process normalises with the statistics of its part: another training than in one process.
    Without batch normalisation the number of processes makes no difference, and is left out.
    """
    trainer = context.config["trainer"]
    processes = trainer["devices"] * trainer["num_nodes"]
    if processes == 1:
        return {}
    modules = build_untrained(node, context.data, 0).modules()
    by_batches = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)
    return {"processes": processes} if by_batches else {}


def is_trained_here(node: Mapping[str, Any]) -> bool:
    """Whether a teacher's weights come out of a training of this experiment."""
    given = node["checkpoint"] or node.get("pretrained")
    return bool(node.get("finetune")) or not given


def initial_student(context: Context, report: bool = False) -> nn.Module:
    """The student before any training, from ``student.init_from`` where that is given."""
    node = context.config["student"]
    network = build_network(node, context.data, context.config["seed"])
    if node["init_from"]:
        told = load_init(network, str(existing_file(node["init_from"], "student.init_from")))
        if report:
            context.console.say(f"student.init_from: {told}")
    return network


def existing_file(path: str, option: str) -> Path:
    """The file that an option names.

    Raises:
        UserError: there is no such file.
    """
    file = typed_path(path)
    if not file.is_file():
        raise UserError(f"{option}={path}: no such file")
    return file


def train_alone(
    context: Context,
    network: nn.Module,
    name: str,
    role: str,
    seed: int,
    key: Mapping[str, Any],
    directory: Path,
) -> None:
    """Train a network with the supervised loss into ``directory``.

    Raises:
        UserError: the distillation that is to follow could not be put together.
    """
    # What cannot be put together or recorded is found now, not when this training is over.
    following = assemble_untrained(context.config, context.data, context.task)
    if context.config["teacher"]["cache"] != "none":
        refuse_unrecordable(context.config["teacher"], following.method, context.data.num_classes)
    assembly = assemble(Supervised(), network, {}, task=context.task, data=context.data, seed=seed)
    train(context, assembly, name=name, role=role, seed=seed, key=key, directory=directory)


def load_network(context: Context, source: str) -> nn.Module:
    """A finished network: as a later stage has adapted it, else from the artefact of the stage
    named like its config entry."""
    if source in context.networks:
        return copy.deepcopy(context.networks[source]).eval()
    node = dict(context.config[source])
    if "pretrained" in node:
        # The stage has kept the weights; the library's own need not be fetched again.
        node["pretrained"] = False
    network = build_network(node, context.data, node.get("seed", 0))
    load_weights(network, context.artefacts[source].path(WEIGHTS[node["weights"]]))
    return network.eval()
