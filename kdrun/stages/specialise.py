"""The stages of MST-Distill: co-training, specialised teachers, routed distillation, evaluation.

The products of the first two lie in the store: runs that differ only in how they route share them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from kdrun import distributed
from kdrun.assembly import (
    Assembly,
    assemble,
    assemble_untrained,
    build_network,
    make_method,
)
from kdrun.checkpoints import load_weights
from kdrun.data.module import DataModule
from kdrun.errors import UserError
from kdrun.evaluation import Predictions
from kdrun.files import file_sha256, read_json
from kdrun.layers.masks import SpecialisedTeacher
from kdrun.methods.mst import (
    MST,
    STUDENT,
    TARGET,
    TEACHERS,
    CoTraining,
    Panel,
    Specialisation,
    of_teacher,
)
from kdrun.parameters import Positive, PositiveInt
from kdrun.report.specialists import specialists_table
from kdrun.stages.distil import Distil
from kdrun.stages.evaluate import EPOCHS, results_on_test
from kdrun.stages.stage import Context, Stage
from kdrun.stages.train import existing_file, initial_student
from kdrun.stages.training import architecture, train, training_key, training_settings
from kdrun.tasks.imitation import Imitation

COTRAIN, SPECIALISE = "cotrain", "specialise"
"""Names of the first two stages in a recipe."""


class CoTrain(Stage):
    """Phase 1: teacher, auxiliary teacher and student learn together from their first weights.

    Args:
        epochs: of ``training.epochs``, which phase 3 has the rest of.
        lr: learning rate of all three; null: as ``training`` says.
    """

    kind: ClassVar[str] = "cotrained"
    shared: ClassVar[bool] = True

    def __init__(self, *, epochs: PositiveInt = 1, lr: Positive | None = None) -> None:
        self.epochs, self.lr = epochs, lr

    def run(self, context: Context, name: str) -> None:
        """As any stage, once it is sure that the later phases can work."""
        total = context.config["training"]["epochs"]
        if self.epochs >= total and context.limit_batches is None:
            raise UserError(
                f"recipe.stages.{name}.epochs={self.epochs} leaves nothing of training.epochs="
                f"{total} for the last phase; lower it"
            )
        mst_of(context)
        for role in TEACHERS:
            entry(context, role)
        # Layers that do not exist, or more teachers asked for than there are.
        assemble_untrained(context.config, context.data, context.task)
        super().run(context, name)

    def key(self, context: Context) -> dict[str, Any]:
        """The three networks, where they start, and their training."""
        config, here = context.config, in_phase(context, self.epochs, self.lr)
        key: dict[str, Any] = {"temperature": mst_of(context).temperature, "seed": config["seed"]}
        for role in (STUDENT, *TEACHERS):
            node = entry(context, role)
            key[role] = architecture(node)
            for option in ("checkpoint", "init_from"):
                if node.get(option):
                    file = existing_file(node[option], f"{role}.{option}")
                    key[f"start of {role}"] = file_sha256(file)
            if role != STUDENT:
                key[f"training of {role}"] = training_settings(here.config, role)
        return key | training_key(here, STUDENT)

    def tested(self, context: Context) -> dict[str, nn.Module]:
        """Both teachers and the student as they are after this phase."""
        networks = cotrained(context)
        networks["cotrained"] = networks.pop(STUDENT)
        return networks

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Train all three."""
        seed = context.config["seed"]
        teachers = {}
        for number, role in enumerate(TEACHERS, start=1):
            node = entry(context, role)
            teachers[role] = build_network(node, context.data, seed + 1000 * number)
            if node["checkpoint"]:
                load_weights(
                    teachers[role], existing_file(node["checkpoint"], f"{role}.checkpoint")
                )
        here = in_phase(context, self.epochs, self.lr)
        assembly = assemble(
            CoTraining(temperature=mst_of(context).temperature),
            initial_student(context, report=True),
            teachers,
            task=context.task,
            data=context.data,
            seed=seed,
        )
        options = {"seed": seed, "key": self.key(context), "directory": directory}
        train(here, assembly, name=name, role=STUDENT, product=STUDENT, **options)


class Specialise(Stage):
    """Phase 2: masks in the frozen teachers, each trained alone to approach the frozen student.

    Args:
        epochs: of this phase.
        lr: learning rate of the masks; null: as ``training`` says.
        weights: whether the masks of the last epoch are kept, or of that with the smallest ``kl``
            on validation (see ``Imitation``).
    """

    kind: ClassVar[str] = "specialists"
    shared: ClassVar[bool] = True

    def __init__(
        self,
        *,
        epochs: PositiveInt = 1,
        lr: Positive | None = None,
        weights: Literal["last", "best"] = "best",
    ) -> None:
        self.epochs, self.lr, self.weights = epochs, lr, weights

    def wanted(self, context: Context) -> bool:
        """Not without masks."""
        return mst_of(context).masks

    def key(self, context: Context) -> dict[str, Any]:
        """The co-trained networks, where the masks are, and their training."""
        node = context.config["method"]
        options = ("temperature", "layers", "teacher_layers", "aux_layers")
        options += ("mask_heads", "mask_reduction")
        return {
            "cotrained": context.artefacts[COTRAIN].name,
            "masks": {option: node.get(option) for option in options},
            "seed": context.config["seed"],
        } | training_key(in_phase(context, self.epochs, self.lr), STUDENT)

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Train every mask."""
        seed, plain = context.config["seed"], plain_specialists(context)
        student, specialists = plain.student, plain.teachers
        first, *rest = specialists
        method = Specialisation(names=list(specialists), temperature=plain.method.temperature)
        task = Imitation(
            task=context.task,
            teachers={role: own for role in TEACHERS if (own := of_teacher(role, specialists))},
            temperature=method.temperature,
        )
        here = replace(in_phase(context, self.epochs, self.lr), task=task)
        others = {name: specialists[name] for name in rest} | {TARGET: student}
        assembly = assemble(
            method, specialists[first], others, task=task, data=context.data, seed=seed
        )
        options = {"seed": seed, "key": self.key(context), "directory": directory}
        train(here, assembly, name=name, role=STUDENT, product="specialists", **options)


class DistilRouted(Distil):
    """Phase 3: the co-trained student goes on, with the specialised teachers and a gate.

    It has the epochs of ``training.epochs`` that co-training has left.

    Args:
        lr: learning rate of student and gate; null: as ``training`` says.
        best: the validation metric whose best epoch gives the best student: the task's own, or the
            smallest ``loss``, as in the paper.
    """

    def __init__(
        self, *, lr: Positive | None = None, best: Literal["loss", "objective"] = "loss"
    ) -> None:
        self.lr, self.best = lr, best

    def check(self, config: Mapping[str, Any], data: DataModule) -> None:
        """Refuse masks that no stage trains."""
        super().check(config, data)
        method, stages = make_method(config["method"]), config["recipe"]["stages"]
        if isinstance(method, MST) and method.masks and SPECIALISE not in stages:
            raise UserError(
                f"recipe.stages.{SPECIALISE} trains the masks: do not take it out, or set "
                "method.masks=false"
            )

    def run(self, context: Context, name: str) -> None:
        """As any stage, with the settings of this phase."""
        done = read_json(context.artefacts[COTRAIN].path("training.json"))["epochs"]
        epochs = context.config["training"]["epochs"] - done
        here = in_phase(context, epochs, self.lr, ema=context.config["training"]["ema"])
        if self.best == "loss":
            here = replace(here, task=context.task.judged_by("loss", "min"))
        super().run(here, name)

    def assembled(self, context: Context) -> Assembly:
        """The student and the specialised teachers, their masks trained."""
        return trained_specialists(context)


class EvaluateRouted(Stage):
    """Test the teachers, the student after phase 1, alone and distilled; show phases 2 and 3."""

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Fill ``context.result``."""
        assembly = trained_specialists(context)
        networks = CoTrain().tested(context)
        for epoch, ending in EPOCHS.items():
            if "alone" in context.artefacts:
                networks[f"alone/{epoch}"] = loaded(
                    initial_student(context), context, "alone", f"network{ending}"
                )
            networks[f"distilled/{epoch}"] = loaded(
                build_network(context.config["student"], context.data, context.config["seed"]),
                context,
                "distil",
                f"student{ending}",
            )
        predictions = Predictions()
        result = results_on_test(context, networks, predictions, TEACHERS)
        if distributed.rank() == 0:
            predictions.save(directory / "predictions.safetensors")
        stages = {"cotrained": COTRAIN, "alone": "alone", "distilled": "distil"}
        for role, stage in stages.items():
            if role in result:
                result[role]["training"] = read_json(context.artefacts[stage].path("training.json"))
        context.result["networks"] = result
        training = result["distilled"]["training"]
        context.result["objective"] = training["validation"]["best"][context.task.objective]
        context.result["specialists"] = specialists_of(context, assembly)
        context.console.say("")
        context.console.say(specialists_table(context.result["specialists"]))


# -- parts of the phases ---------------------------------------------------------------------------


def mst_of(context: Context) -> MST:
    """The method, which holds the options of all phases.

    Raises:
        UserError: the recipe goes with another method.
    """
    method = make_method(context.config["method"])
    if not isinstance(method, MST):
        raise UserError("the stages of recipe=mst go with method=mst; choose another recipe")
    return method


def entry(context: Context, role: str) -> Mapping[str, Any]:
    """The config entry of a role.

    Raises:
        UserError: there is none.
    """
    if role not in context.config:
        raise UserError(f"MST needs a {role}: give {role}=<model>")
    return context.config[role]


def in_phase(context: Context, epochs: int, lr: float | None, ema: float | None = None) -> Context:
    """The run with the training settings of one phase; a trial has one epoch of each.

    A phase shares no pass over the data with runs beside it: what it trains is its own.
    """
    training = dict(context.config["training"])
    training |= {"epochs": epochs if context.limit_batches is None else 1, "ema": ema}
    if lr is not None:
        training["optimizer"] = {**training["optimizer"], "lr": lr}
    return replace(context, config=context.config | {"training": training}, member=None)


def loaded(network: nn.Module, context: Context, stage: str, file: str) -> nn.Module:
    """A network with the weights that a stage left."""
    load_weights(network, context.artefacts[stage].path(f"{file}.safetensors"))
    return network.eval()


def cotrained(context: Context) -> dict[str, nn.Module]:
    """Student, teacher and auxiliary teacher after phase 1."""
    seed = context.config["seed"]
    return {
        role: loaded(
            build_network(entry(context, role), context.data, seed), context, COTRAIN, role
        )
        for role in (STUDENT, *TEACHERS)
    }


def plain_specialists(context: Context) -> Assembly:
    """The method, the co-trained student, and specialised teachers with untrained masks."""
    networks = cotrained(context)
    student = networks.pop(STUDENT)
    return assemble(
        mst_of(context),
        student,
        networks,
        task=context.task,
        data=context.data,
        seed=context.config["seed"],
    )


def trained_specialists(context: Context) -> Assembly:
    """The same with the masks of phase 2."""
    assembly = plain_specialists(context)
    if assembly.method.masks:
        weights = kept_masks(context)
        panel = Panel(assembly.teachers, assembly.student)
        loaded(panel, context, SPECIALISE, f"specialists{EPOCHS[weights]}")
        assembly.teachers = assembly.method.teachers_of_phase_3(assembly.teachers)
    return assembly


def kept_masks(context: Context) -> str:
    """Which masks phase 2 has kept: those of the ``last`` epoch or of the ``best`` one."""
    return context.config["recipe"]["stages"][SPECIALISE].get("weights", "best")


def specialists_of(context: Context, assembly: Assembly) -> dict[str, dict[str, Any]]:
    """What phases 2 and 3 did with each teacher, by name.

    ``layer``; on validation in phase 2 the divergence from the student (``kl``), of the teacher
    without the mask (``plain_kl``) and the spread of the mask; in phase 3 the share of samples
    routed to it in the first and last epoch.
    """
    with context.artefacts["distil"].path("metrics.csv").open() as file:
        epochs = list(csv.DictReader(file))
    found: dict[str, dict[str, Any]] = {}
    for name, teacher in assembly.teachers.items():
        column = f"share_{name}"
        shares = {"first": float(epochs[0][column]), "last": float(epochs[-1][column])}
        found[name] = {"share": shares}
        if isinstance(teacher, SpecialisedTeacher):
            training = read_json(context.artefacts[SPECIALISE].path("training.json"))
            values = training["validation"][kept_masks(context)]
            found[name] |= {what: values[f"{what}_{name}"] for what in ("kl", "plain_kl", "spread")}
            found[name]["layer"] = teacher.locations[-1].removeprefix("input:")
    return found
