"""The stage that distils: the method, its networks, and the training of the student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdrun.assembly import (
    Assembly,
    assemble,
    build_network,
    make_method,
    sample_batch,
    with_batch_statistics,
)
from kdrun.checkpoints import load_weights
from kdrun.data.module import DataModule
from kdrun.errors import UserError
from kdrun.evaluation import evaluate
from kdrun.given_weights import refuse_other_start
from kdrun.layers.frozen import fold_batch_norm, run_in_bfloat16
from kdrun.stages.recorded import is_approximate, open_recording
from kdrun.stages.stage import Context, Stage
from kdrun.stages.train import existing_file, initial_student, load_network
from kdrun.stages.training import (
    architecture,
    own_settings,
    train,
    trained_sources,
    training_key,
    training_settings,
)

SMALL_SHARE = 0.01
"""A loss term with a smaller share of the first gradient hardly takes part; the user is told."""

SMALLEST_AGREEMENT = 99.0
"""Percent of the samples on which a cheaper form of a teacher should say what the teacher says."""


class Distil(Stage):
    """Train the student by the method, from the same initial weights as the student alone."""

    def check(self, config: Mapping[str, Any], data: DataModule) -> None:
        """Refuse methods made for other tasks, settings and checkpoints with which further networks
        cannot be trained, and data that the method cannot learn from.
        """
        method = make_method(config["method"])
        if method.tasks and data.task not in method.tasks:
            made_for = ", ".join(method.tasks)
            raise UserError(f"{type(method).__name__} is made for {made_for}, not for {data.task}")
        refuse_other_start(config["student"], data)
        own_settings(config, method)
        for source in trained_sources(method).values():
            start = config.get(source, {}).get("checkpoint")
            if start:
                existing_file(start, f"{source}.checkpoint")
        if method.unlabelled and not data.has_unlabelled:
            raise UserError(
                f"{config['method']['_target_']} learns from samples without labels too, but this "
                "data set has none: choose one that has, such as dataset=digits_few_shot, or ask "
                "for fewer labels"
            )
        batches = data.train(
            batch_size=training_settings(config, "student")["batch_size"],
            seed=config["seed"],
            device="cpu",
            views=method.views,
            unlabelled=method.unlabelled,
        )
        try:
            method.inspect(batches)
        except ValueError as error:
            raise UserError(f"{type(method).__name__}: {error}") from error

    def key(self, context: Context) -> dict[str, Any]:
        """Everything: this product belongs to one run."""
        config = context.config
        artefacts = {name: artefact.name for name, artefact in context.artefacts.items()}
        key = {"student": architecture(config["student"]), "method": config["method"]}
        trained = {
            role: {"network": config[source], "training": training_settings(config, source)}
            for role, source in trained_sources(make_method(config["method"])).items()
            if source in config
        }
        if trained:
            key["trained"] = trained
        return (
            key
            | training_key(context, "student")
            | {
                "seed": config["seed"],
                "inputs": {name: value for name, value in artefacts.items() if name != "alone"},
            }
        )

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Train."""
        assembly = self.assembled(context)
        outcome = train(
            context,
            assembly,
            name=name,
            role="student",
            seed=context.config["seed"],
            key=self.key(context),
            directory=directory,
            product="student",
            recording=open_recording(context, assembly),
        )
        for term, share in outcome.gradient_shares.items():
            if share < SMALL_SHARE:
                context.console.say(
                    f"warning: the term {term} made up {100 * share:.2f}% of the gradient at the "
                    f"first step; raise its weight in method.* if it is meant to matter"
                )

    def assembled(self, context: Context) -> Assembly:
        """The method and all networks, the frozen teachers checked."""
        assembly = assemble_run(context, training=True)
        self._check_teachers(context, assembly)
        return assembly

    def _check_teachers(self, context: Context, assembly: Assembly) -> None:
        """Print each frozen teacher's validation result; refuse one that knows nothing."""
        task = context.task
        frozen = [role for role in assembly.teachers if role not in assembly.method.trainable_roles]
        for role in frozen:
            networks = {role: assembly.teachers[role]}
            source = assembly.method.roles()[role]
            if is_approximate(context.config[source]):
                networks["exact"] = frozen_network(context, source)
            metrics = evaluate(
                networks,
                context,
                context.data.validation,
                reference="exact" if "exact" in networks else None,
            )[role]
            value = metrics[task.objective]
            named = context.names.get(source, source)
            context.console.say(f"{role}: {named}, validation {task.objective} {value:.2f}")
            if "agreement" in metrics:
                self._report_agreement(context, source, metrics["agreement"])
            chance = task.chance()
            allowed = context.config[source]["allow_chance"]
            if chance is None or context.limit_batches or allowed:
                continue
            guess, margin = chance
            gain = value - guess if task.direction == "max" else guess - value
            if not gain >= margin:  # Also where it is no number.
                raise UserError(
                    f"the {role} is at chance ({task.objective} {value:.2f} on validation, "
                    f"guessing gives {guess:.2f}): train it longer or choose another; "
                    f"{source}.allow_chance=true distils from it all the same"
                )

    def _report_agreement(self, context: Context, source: str, agreement: float) -> None:
        options = f"{source}.precision and {source}.fold"
        context.console.say(
            f"{source}: as set by {options}, it agrees with its exact self on {agreement:.2f}% "
            "of the validation split"
        )
        if agreement < SMALLEST_AGREEMENT:
            context.console.say(
                f"warning: that is little; without {options} it teaches what it learned"
            )


def in_cheaper_form(network: nn.Module, node: Mapping[str, Any], data: DataModule) -> nn.Module:
    """A frozen network as ``precision`` and ``fold`` of its config node ask for.

    Raises:
        UserError: it cannot be folded.
    """
    if node["fold"]:
        try:
            network = fold_batch_norm(network, sample_batch(data).inputs)
        except ValueError as error:
            raise UserError(f"fold=true: {error}") from error
    return run_in_bfloat16(network) if node["precision"] == "bf16" else network


def frozen_network(context: Context, source: str) -> nn.Module:
    """A finished network as ``mode`` of its config entry asks for it."""
    network = load_network(context, source)
    if context.config[source]["mode"] == "batch_stats":
        return with_batch_statistics(network)
    return network


def assemble_run(context: Context, training: bool = False) -> Assembly:
    """The method and all networks of a run, with the initial student.

    For ``training``, frozen networks may come in a cheaper form.
    """
    config = context.config
    method = make_method(config["method"])
    teachers: dict[str, nn.Module] = {}
    for number, (role, source) in enumerate(method.roles().items(), start=1):
        if source not in config:
            raise UserError(
                f"{config['method']['_target_']} needs a {source}: give {source}=<model>"
            )
        if role in method.trainable_roles:
            # Another seed than the student's: a peer of the same architecture starts elsewhere.
            seed = config["seed"] + 1000 * number
            teachers[role] = build_network(config[source], context.data, seed)
            start = config[source].get("checkpoint")
            if start:
                load_weights(teachers[role], existing_file(start, f"{source}.checkpoint"))
        else:
            teachers[role] = frozen_network(context, source)
            if training:
                teachers[role] = in_cheaper_form(teachers[role], config[source], context.data)
    return assemble(
        method,
        initial_student(context),
        teachers,
        task=context.task,
        data=context.data,
        seed=config["seed"],
    )
