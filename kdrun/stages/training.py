"""What all training stages share: settings, keys, and one call that trains an assembly."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdrun import distributed
from kdrun.assembly import Assembly
from kdrun.data.loader import Loader
from kdrun.distiller import STUDENT, Distiller, MakeOptimizer, MakeScheduler, Optimization
from kdrun.errors import UserError
from kdrun.files import write_json
from kdrun.fit import SKIPPED, Outcome, fit, make_trainer
from kdrun.logs import TrainingLog
from kdrun.method import Method
from kdrun.models.build import ROLE_KEYS
from kdrun.optimization import make_optimizer, make_scheduler
from kdrun.recording import Recording
from kdrun.stages.recorded import check_recording, recorded_role
from kdrun.stages.sharing import share_pass
from kdrun.stages.stage import Context
from kdrun.store import fingerprint

COMPILED_VARIANTS = 64
"""Compiled forms of one network's code, above which it would run uncompiled."""
FORMAT = 1
"""Raised when a change of the code makes stored networks incomparable with new ones."""


def architecture(node: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a network's config node that determines its architecture."""
    return {key: value for key, value in node.items() if key not in ROLE_KEYS}


def training_settings(config: Mapping[str, Any], role: str) -> dict[str, Any]:
    """The ``training`` group as it holds for a role.

    ``training.teacher`` overrides it for every network but the student.
    """
    settings = dict(config["training"])
    overrides = settings.pop("teacher", None) or {}
    if role != STUDENT:
        settings |= {key: value for key, value in overrides.items() if value is not None}
    return settings


def training_key(context: Context, role: str) -> dict[str, Any]:
    """What any training depends on besides its networks and method."""
    trainer = context.config["trainer"]
    numerics = ("precision", "accumulate", "compile", "channels_last")
    key = {
        "format": FORMAT,
        "data": context.data.fingerprint,
        "task": context.config["task"],
        "protocol": context.config["protocol"],
        "training": training_settings(context.config, role),
        "numerics": {name: trainer[name] for name in numerics},
        "limit_batches": context.limit_batches,
    }
    if role == STUDENT and context.config["data_seed"] is not None:
        key["data_seed"] = context.config["data_seed"]
    return key


def data_seed(config: Mapping[str, Any], role: str, seed: int) -> int:
    """The seed of data order and augmentation in the training of a role seeded with ``seed``.

    A teacher has its own, so that runs whatever their ``data_seed`` share it.
    """
    given = config["data_seed"] if role == STUDENT else None
    return seed if given is None else given


def optimization_of(
    context: Context, method: Method, settings: Mapping[str, Any], steps: int
) -> Optimization:
    """Optimisers and schedules of everything that a method trains.

    A role that is built from another config entry than the student's has that entry's settings
    (``training.teacher`` for a teacher that learns too).

    Args:
        context: the run.
        method: says which roles are trained.
        settings: of the training, as they hold for the student.
        steps: optimiser steps in an epoch.

    Raises:
        UserError: see ``own_settings``.
    """
    options, epochs = context.config["trainer"], settings["epochs"]

    def own(settings: Mapping[str, Any]) -> tuple[MakeOptimizer, MakeScheduler]:
        return (
            lambda parameters: make_optimizer(settings["optimizer"], parameters),
            lambda optimizer: make_scheduler(settings["scheduler"], optimizer, epochs, steps),
        )

    of_roles = {role: own(theirs) for role, theirs in own_settings(context.config, method).items()}
    optimizer, scheduler = own(settings)
    return Optimization(
        optimizer=optimizer,
        scheduler=scheduler,
        accumulate=options["accumulate"],
        clip_norm=settings["clip_norm"],
        ema_decay=settings["ema"],
        nonfinite=settings["nonfinite"],
        of_roles=of_roles,
    )


def own_settings(config: Mapping[str, Any], method: Method) -> dict[str, dict[str, Any]]:
    """Training settings of the trained roles that are not built as the student is, by role.

    Raises:
        UserError: such a role has another number of epochs or batch size, though all networks see
            the same batches.
    """
    ours, found = training_settings(config, STUDENT), {}
    for role, source in trained_sources(method).items():
        found[role] = training_settings(config, source)
        for name in ("epochs", "batch_size"):
            if found[role][name] != ours[name]:
                raise UserError(
                    f"training.{source}.{name}={found[role][name]}: the {role} learns together "
                    f"with the student, so it must be null or the student's {ours[name]}"
                )
    return found


def trained_sources(method: Method) -> dict[str, str]:
    """Config entries of the trained roles that are not built as the student is, by role."""
    return {
        role: source
        for role, source in method.roles().items()
        if role in method.trainable_roles and source != STUDENT
    }


def train(
    context: Context,
    assembly: Assembly,
    *,
    name: str,
    role: str,
    seed: int,
    key: Mapping[str, Any],
    directory: Path,
    product: str = "network",
    recording: Recording | None = None,
) -> Outcome:
    """Train an assembly into ``directory`` (see ``kdrun.fit.fit`` for the files).

    Args:
        context: the run.
        assembly: method and networks.
        name: the stage, for messages and logs.
        role: whose training settings hold.
        seed: of dropout and the like, and of data order and augmentation without a ``data_seed``.
        key: names what is trained.
        directory: where to write.
        product: what the weight files are called.
        recording: outputs of the frozen teacher, used in place of running it.
    """
    settings = training_settings(context.config, role)
    options = context.config["trainer"]
    epochs, batch_size = settings["epochs"], settings["batch_size"]
    trainer = make_trainer(options, epochs=epochs)
    device = trainer.strategy.root_device
    rank, world_size = distributed.rank(), distributed.world_size()
    dtype = torch.float64 if options["precision"] == 64 else torch.float32
    place = {"device": device, "rank": rank, "world_size": world_size, "dtype": dtype}
    place["channels_last"] = options["channels_last"]
    # Every rank needs a sample of every batch: a mean over none is no number.
    rest = context.data.labelled_size % batch_size
    order = data_seed(context.config, role, seed)

    def make_loader(views: tuple[str, ...], *, in_stored_order: bool = False) -> Loader:
        return context.data.train(
            batch_size=batch_size,
            seed=order,
            views=views,
            augment=not in_stored_order,
            shuffle=not in_stored_order,
            drop_last=not in_stored_order and 0 < rest < world_size,
            cycle=recording.cycle if recording else None,
            unlabelled=assembly.method.unlabelled,
            **place,
        )

    loader = make_loader(assembly.method.views)
    validation = context.data.validation(
        batch_size=context.data.evaluation_batch_size(batch_size), **place
    )
    steps = len(loader) if context.limit_batches is None else context.limit_batches
    if recording is not None:
        check_recording(recording, context, assembly, loader, epochs, device)
    distiller, recorded = _engine(context, assembly, settings, steps, recording)
    distiller.to(device)
    try:
        # An epoch may leave out some samples and repeat others.
        every_sample_once = make_loader(assembly.method.views, in_stored_order=True)
        assembly.method.prepare(distiller.frozen | recorded, every_sample_once)
        del every_sample_once  # And with it its worker processes.
    except ValueError as error:
        raise UserError(f"{type(assembly.method).__name__}: {error}") from error
    for network in recorded.values():
        network.cpu()  # Its memory is free for training.
    if context.member is not None:
        alike = (batch_size, order)
        loader = share_pass(
            context.member, context, assembly, distiller, loader, make_loader, alike
        )
    seen = min(batch_size, context.data.train_size)
    log = TrainingLog(context.console, name, seen, context.loggers, context.task.objective)
    # Dropout and the like draw from the global generators: the same for the same seed, whichever
    # stages ran, or were found in the store, before.
    torch.manual_seed(seed)
    random.seed(seed)
    outcome = fit(
        distiller,
        loader,
        validation,
        trainer=trainer,
        directory=directory,
        key=fingerprint(key),
        log=log,
        watch=context.watch,
        product=product,
        keep_last=options["keep_last"],
        limit_batches=context.limit_batches,
        patience=settings["patience"],
        ties=settings["ties"],
    )
    if distributed.rank() == 0:
        write_json(directory / "training.json", summary(context, outcome))
    distributed.barrier()
    return outcome


def _engine(
    context: Context,
    assembly: Assembly,
    settings: Mapping[str, Any],
    steps: int,
    recording: Recording | None,
) -> tuple[Distiller, dict[str, nn.Module]]:
    """What trains an assembly; and, by role, the network that a recording speaks for there."""
    options, batch_size = context.config["trainer"], settings["batch_size"]
    teachers, stand_ins, recorded = dict(assembly.teachers), {}, {}
    if recording is not None:
        role = recorded_role(assembly.method)
        stand_ins[role], recorded[role] = recording, teachers.pop(role)
    distiller = Distiller(
        task=context.task,
        method=assembly.method,
        student=assembly.student,
        teachers=teachers,
        stand_ins=stand_ins,
        taps=assembly.taps,
        optimization=optimization_of(context, assembly.method, settings, steps),
        epochs=settings["epochs"],
        steps_per_epoch=steps,
    )
    distiller.trained_on = context.data.signature
    distiller.global_batch = lambda position: context.data.samples_at(position, batch_size)
    if options["channels_last"]:
        for network in (*distiller.networks.values(), *distiller.frozen.values()):
            network.to(memory_format=torch.channels_last)
    if options["compile"]:
        compile_networks(distiller)
    return distiller, recorded


def compile_networks(distiller: Distiller) -> None:
    """Compile every network of a training, so that what was compiled before makes no difference.

    Kernels that came from other shapes, or from earlier trainings of this process, round otherwise:
    a training that goes on after an interruption would not be the one left alone. So each shape has
    kernels of its own, and each training starts with none.
    """
    torch._dynamo.reset()
    # One network has a kernel for each shape and mode; there may be several of the same class.
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    # The first step takes the gradient of each term by itself, so backward runs repeatedly.
    torch._functorch.config.donated_buffer = False
    for network in (*distiller.networks.values(), *distiller.frozen.values()):
        network.compile(dynamic=False)


def summary(context: Context, outcome: Outcome) -> dict[str, Any]:
    """The facts of a training that later stages and reports read."""
    prefix = "validation/"

    def validation(row: Mapping[str, float]) -> dict[str, float]:
        return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}

    best = outcome.history[outcome.best_epoch - 1]
    return {
        "epochs": len(outcome.history),
        "best_epoch": outcome.best_epoch,
        "seconds": outcome.seconds,
        "samples_per_second": outcome.history[-1]["samples_per_second"],
        "validation": {"last": validation(outcome.history[-1]), "best": validation(best)},
        "gradient_shares": outcome.gradient_shares,
        "skipped_steps": sum(int(row.get(SKIPPED, 0)) for row in outcome.history),
    }
