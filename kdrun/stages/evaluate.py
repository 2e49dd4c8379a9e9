"""The last stage: the test set, once, for everything the run compares."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdrun import distributed
from kdrun.assembly import Assembly
from kdrun.checkpoints import load_weights
from kdrun.evaluation import Predictions, evaluate, parameter_count
from kdrun.files import read_json
from kdrun.stages.companions import trained_companions
from kdrun.stages.distil import assemble_run
from kdrun.stages.stage import Context, Stage
from kdrun.stages.train import initial_student

EPOCHS = {"last": "", "best": "_best"}
"""Which epoch's weights, and what their file's name ends in."""

TEACHER = {"teacher": "teacher"}


class Evaluate(Stage):
    """Evaluate teacher, student alone and distilled student (last, and best on validation)."""

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Fill ``context.result`` with the metrics of every network."""
        assembly = assemble_run(context)
        networks = trained_networks(context, assembly)
        networks |= trained_companions(context, assembly)
        predictions = Predictions()
        sources = assembly.method.roles()
        result = results_on_test(context, networks, predictions, sources)
        if distributed.rank() == 0:
            predictions.save(directory / "predictions.safetensors")
        for role in result:
            stage = "distil" if role == "distilled" else sources.get(role, role)
            if stage in context.artefacts:
                training = read_json(context.artefacts[stage].path("training.json"))
                result[role]["training"] = training
        context.result["networks"] = result
        training = result["distilled"]["training"]
        context.result["objective"] = training["validation"]["best"][context.task.objective]


def trained_networks(context: Context, assembly: Assembly) -> dict[str, nn.Module]:
    """All networks of a run with the weights that its stages left.

    Args:
        context: the run, after its student was distilled.
        assembly: the method and the networks of the run.

    Returns:
        The teachers by role, ``alone/<epoch>`` and ``distilled/<epoch>``, on the CPU.
    """
    networks: dict[str, nn.Module] = dict(assembly.teachers)
    for role in assembly.method.trainable_roles:
        load_weights(networks[role], context.artefacts["distil"].path(f"{role}.safetensors"))
    for epoch, ending in EPOCHS.items():
        if "alone" in context.artefacts:
            network = initial_student(context)
            load_weights(network, context.artefacts["alone"].path(f"network{ending}.safetensors"))
            networks[f"alone/{epoch}"] = network
        deployed = copy.deepcopy(assembly.deployed())
        load_weights(deployed, context.artefacts["distil"].path(f"student{ending}.safetensors"))
        networks[f"distilled/{epoch}"] = deployed
    return networks


def results_on_test(
    context: Context,
    networks: Mapping[str, nn.Module],
    predictions: Predictions | None = None,
    sources: Mapping[str, str] = TEACHER,
) -> dict[str, Any]:
    """The metrics of several networks on the test split, in the form of ``result.json``.

    Args:
        context: the run.
        networks: by ``<role>`` or, where a role comes with several weights, ``<role>/<epoch>``;
            where there is a ``teacher``, the agreement of all others with it is measured.
        predictions: where to keep what the networks say of each sample; None: nowhere.
        sources: the config entry of each role that is not built as the student is.

    Returns:
        By role: name and size of the network, and its metrics as ``test`` or ``test_<epoch>``.
    """
    reference = "teacher" if "teacher" in networks else None
    metrics = evaluate(networks, context, context.data.test, reference, predictions)
    result: dict[str, Any] = {}
    for label, network in networks.items():
        role, _, epoch = label.partition("/")
        facts = {
            "network": context.names.get(sources.get(role, "student"), role),
            "parameters": parameter_count(network),
        }
        entry = result.setdefault(role, facts)
        entry[f"test_{epoch}" if epoch else "test"] = metrics[label]
    return result
