"""The stage that distils: the method, its networks, and the training of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kdrun.assembly import Assembly, assemble, build_network, make_method, with_batch_statistics
from kdrun.checkpoints import load_weights
from kdrun.errors import UserError
from kdrun.evaluation import evaluate
from kdrun.stages.recorded import open_recording
from kdrun.stages.stage import Context, Stage
from kdrun.stages.train import existing_file, initial_student, load_network
from kdrun.stages.training import (
    architecture,
    train,
    trained_sources,
    training_key,
    training_settings,
)

SMALL_SHARE = 0.01
"""A loss term with a smaller share of the first gradient hardly takes part; the user is told."""


class Distil(Stage):
    """Train the student by the method, from the same initial weights as the student alone."""

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
        """Check the teacher, then train."""
        assembly = assemble_run(context)
        self._check_teachers(context, assembly)
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

    def _check_teachers(self, context: Context, assembly: Assembly) -> None:
        """Print each frozen teacher's validation result; refuse one that knows nothing."""
        task = context.task
        frozen = [role for role in assembly.teachers if role not in assembly.method.trainable_roles]
        for role in frozen:
            metrics = evaluate({role: assembly.teachers[role]}, context, context.data.validation)[
                role
            ]
            value = metrics[task.objective]
            context.console.say(
                f"{role}: {context.names.get(role, role)}, validation {task.objective} {value:.2f}"
            )
            chance = task.chance()
            if chance is None or context.limit_batches or context.config["teacher"]["allow_chance"]:
                continue
            guess, margin = chance
            if (value - guess if task.direction == "max" else guess - value) < margin:
                raise UserError(
                    f"the {role} is at chance ({task.objective} {value:.2f} on validation, "
                    f"guessing gives {guess:.2f}): train it longer or choose another; "
                    "teacher.allow_chance=true distils from it all the same"
                )


def assemble_run(context: Context) -> Assembly:
    """The method and all networks of a run, with the initial student."""
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
            teachers[role] = load_network(context, source)
            if config[source]["mode"] == "batch_stats":
                teachers[role] = with_batch_statistics(teachers[role])
    return assemble(
        method,
        initial_student(context),
        teachers,
        task=context.task,
        data=context.data,
        seed=config["seed"],
    )
