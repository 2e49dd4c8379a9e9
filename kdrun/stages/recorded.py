"""What a run asks of the recording of its teacher, and whether it can use one at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from kdrun.assembly import Assembly
from kdrun.data.loader import AugmentationCycle, Loader
from kdrun.errors import UserError
from kdrun.forward import run_network
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput
from kdrun.recording import Dense, Encoding, Recording, TopK
from kdrun.stages.stage import Context

FORMAT = 1
"""Raised when a change of the code makes older recordings useless."""
STAGE = "teacher_outputs"
"""The stage of the recipe that records."""
ENTRY = "teacher"
"""The config entry whose network is recorded."""
FORM = ("precision", "fold")
"""Options of the entry that say in which form its network runs while a student is trained."""
CHECKED_SAMPLES = 8
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def is_approximate(node: Mapping[str, Any]) -> bool:
    """Whether a frozen network is run in a cheaper form while a student is trained."""
    return node["precision"] != 32 or node["fold"]


def recorded_role(method: Method) -> str | None:
    """The frozen role that the recorded network plays in a method; None: there is none."""
    roles = (role for role, source in method.roles().items() if source == ENTRY)
    return next((role for role in roles if role not in method.trainable_roles), None)


def refuse_unrecordable(cache: dict[str, Any], method: Method, num_classes: int) -> None:
    """Check that a method, wrapped around its student, can learn from recorded outputs.

    Args:
        cache: the ``teacher`` entry of the config, with ``teacher.cache`` other than ``none``.
        method: the method.
        num_classes: of the data set.

    Raises:
        UserError: it cannot; names the option to change.
    """
    name, kind = type(method).__name__, cache["cache"]
    role = recorded_role(method)
    if role is None:
        raise UserError(f"teacher.cache={kind}: {name} has no frozen teacher; set it to none")
    if method.irregular:
        raise UserError(
            f"teacher.cache={kind}: {name} runs its teacher in steps of its own; set it to none"
        )
    if method.unlabelled:
        raise UserError(
            f"teacher.cache={kind}: {name} learns from samples without labels too, whose outputs "
            "are not recorded; set it to none"
        )
    if type(method).wrap_teachers is not Method.wrap_teachers:
        raise UserError(
            f"teacher.cache={kind}: {name} runs its teacher in another form; set it to none"
        )
    if type(method).augment is not Method.augment:
        raise UserError(
            f"teacher.cache={kind}: {name} changes the batches that its teacher sees; "
            "set it to none"
        )
    taps = method.taps().get(role, ())
    if taps and kind != "features":
        raise UserError(
            f"teacher.cache={kind}: {name} reads {', '.join(taps)} of the teacher; "
            "set teacher.cache=features"
        )
    if kind == "topk" and cache["cache_top_k"] >= num_classes:
        raise UserError(
            f"teacher.cache_top_k={cache['cache_top_k']}: the data set has {num_classes} classes; "
            "lower it, or set teacher.cache=logits"
        )


def cycle_of(context: Context) -> AugmentationCycle:
    """The augmentations that are recorded; a trial, which has one epoch, needs one."""
    node = context.config[ENTRY]
    length = node["cache_views"] if context.limit_batches is None else 1
    return AugmentationCycle(node["cache_seed"], length)


def encoding_of(context: Context, assembly: Assembly) -> Encoding:
    """How ``teacher.cache`` says that outputs are kept."""
    node = context.config[ENTRY]
    dtype = DTYPES[node["cache_dtype"]]
    if node["cache"] == "topk":
        return TopK(node["cache_top_k"], context.data.num_classes, dtype)
    taps = assembly.taps.get(recorded_role(assembly.method) or "")
    return Dense(dtype, taps.names if taps else ())


def description(context: Context, assembly: Assembly) -> dict[str, Any]:
    """Everything that the recorded outputs depend on, as plain values."""
    cycle, role = cycle_of(context), recorded_role(assembly.method)
    node = context.config[ENTRY]
    # Named only where it is used, so that recordings of exact networks keep their names.
    form = {"form": {name: node[name] for name in FORM}} if is_approximate(node) else {}
    return form | {
        "format": FORMAT,
        "teacher": context.artefacts[ENTRY].name,
        "weights": node["weights"],
        "data and transform": context.data.fingerprint,
        "augmentation seed": cycle.seed,
        "augmentations": cycle.length,
        "views": list(assembly.method.views),
        "outputs": node["cache"],
        "taps": list(assembly.method.taps().get(role or "", ())),
        "encoding": encoding_of(context, assembly).description(),
        "precision": str(context.config["trainer"]["precision"]),
        "limit_batches": context.limit_batches,
    }


def open_recording(context: Context, assembly: Assembly) -> Recording | None:
    """The recording that this run's teacher is to be replaced by; None without ``teacher.cache``.

    Raises:
        UserError: the recipe makes none, or it is of something else.
    """
    kind = context.config[ENTRY]["cache"]
    if kind == "none":
        return None
    refuse_unrecordable(context.config[ENTRY], assembly.method, context.data.num_classes)
    if STAGE not in context.artefacts:
        raise UserError(
            f"teacher.cache={kind}: the recipe does not record the teacher; give it a stage "
            f"{STAGE} (kdrun.stages.record.RecordTeacher) before the one that distils"
        )
    return Recording(
        context.artefacts[STAGE].directory,
        encoding_of(context, assembly),
        views=assembly.method.views,
        cycle=cycle_of(context),
        expected=description(context, assembly),
        dtype=computing_dtype(context),
    )


def check_recording(
    recording: Recording,
    context: Context,
    assembly: Assembly,
    loader: Loader,
    epochs: int,
    device: torch.device,
) -> None:
    """Run the teacher on a few samples of the first and the last augmentation and compare.

    Args:
        recording: is moved to ``device``.
        context: the run.
        assembly: its networks.
        loader: the very one that will train.
        epochs: length of training.
        device: where the loader makes its batches.

    Raises:
        UserError: recorded and live outputs differ by more than rounding explains.
    """
    recording.to(device)
    run = live_teacher(context, assembly, device)
    for epoch in sorted({0, min(recording.cycle.length, epochs) - 1}):
        few = loader.replay(epoch, 0)
        if not context.data.single_batch:
            few = few.rows(slice(CHECKED_SAMPLES))
        if len(few):
            recording.check(run, few, rounding(context, device))


def rounding(context: Context, device: torch.device) -> float:
    """Largest share of the largest value by which two runs of one network may differ.

    Half precision rounds to 2^-11; accelerators multiply in shorter formats, and in another order
    for another batch size.
    """
    if "bf16" in (context.config["trainer"]["precision"], context.config[ENTRY]["precision"]):
        return 2**-4
    return 2**-10 if device.type == "cpu" else 2**-6


def live_teacher(
    context: Context, assembly: Assembly, device: torch.device
) -> Callable[[Batch], ModelOutput]:
    """Moves the teacher to ``device``; gives what runs it on a batch as training would."""
    role = recorded_role(assembly.method)
    network = assembly.teachers[role].to(device, computing_dtype(context)).eval()
    half = context.config["trainer"]["precision"] == "bf16"
    precision = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    taps, views = assembly.taps.get(role), assembly.method.views

    def run(batch: Batch) -> ModelOutput:
        with torch.no_grad(), precision:
            return run_network(context.task, network, batch, taps, views)

    return run


def computing_dtype(context: Context) -> torch.dtype:
    """Type of inputs and weights."""
    return torch.float64 if context.config["trainer"]["precision"] == 64 else torch.float32
