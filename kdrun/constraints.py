"""Combinations of options that cannot work, each with the option to change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kdrun.catalogue import is_further_network


def conflicts(config: Mapping[str, Any]) -> Iterator[str]:
    """Lines for what does not go together in a config whose single values are all valid."""
    training, trainer = config["training"], config["trainer"]
    yield from _schedule(training, "training")
    different = {key: value for key, value in training["teacher"].items() if value is not None}
    if different:
        yield from _schedule({**training, **different}, "training.teacher", training)
    yield from _batches(training["batch_size"], trainer, "training.batch_size")
    if training["teacher"]["batch_size"] is not None:
        yield from _batches(different["batch_size"], trainer, "training.teacher.batch_size")
    yield from _devices(trainer)
    yield from _stage_names(config["recipe"]["stages"])
    further = [key for key in config if is_further_network(key)]
    for entry in ("teacher", *further):
        yield from _frozen(config[entry], entry, trainer)
    yield from _cache(config)
    for entry in further:
        if config[entry]["cache"] != "none":
            yield f"{entry}.cache: only the outputs of teacher can be recorded; set it to none"


def _stage_names(stages: Mapping[str, Any]) -> Iterator[str]:
    """Stages name folders of a run, which must lie in its directory."""
    for name, node in stages.items():
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            yield f"recipe.stages: {name!r} is no name of a stage; use letters, digits, _ and -"
        if isinstance(node, Mapping) and isinstance(node.get("stages"), Mapping):
            yield from _stage_names(node["stages"])


def _frozen(node: Mapping[str, Any], entry: str, trainer: Mapping[str, Any]) -> Iterator[str]:
    pretrained = node["checkpoint"] or node.get("pretrained")
    if node["finetune"] and not pretrained:
        yield f"{entry}.finetune: there are no weights to start from; give {entry}.checkpoint"
    if node["checkpoint"] and node.get("pretrained"):
        yield f"{entry}.checkpoint: {entry}.pretrained=true gives weights too; choose one of them"
    if node["fold"] and node["mode"] == "batch_stats":
        yield f"{entry}.fold: with {entry}.mode=batch_stats there is nothing to fold; set it false"
    if node["precision"] == "bf16" and trainer["precision"] == 64:
        yield f"{entry}.precision: bf16 in a run of 64-bit numbers; set one of them to 32"


def _cache(config: Mapping[str, Any]) -> Iterator[str]:
    teacher, epochs = config["teacher"], config["training"]["epochs"]
    if teacher["cache"] == "none":
        return
    if teacher["mode"] == "batch_stats":
        yield (
            "teacher.cache: with teacher.mode=batch_stats the teacher's outputs depend on the "
            "batch; set teacher.mode=eval or teacher.cache=none"
        )
    if teacher["cache_views"] > epochs:
        yield (
            f"teacher.cache_views: {epochs} epochs cannot use {teacher['cache_views']} "
            "augmentations; lower it or raise training.epochs"
        )
    # A data set of which few samples have labels holds another.
    dataset = config["dataset"]
    for place, node in (("dataset", dataset), ("dataset.data", dataset.get("data"))):
        mix = (node.get("mix") if isinstance(node, Mapping) else None) or {}
        if mix.get("mixup") or mix.get("cutmix"):
            yield (
                f"teacher.cache: mixed images have no recorded outputs; set {place}.mix.mixup=0 "
                f"and {place}.mix.cutmix=0, or teacher.cache=none"
            )


def _schedule(
    training: Mapping[str, Any], place: str, student: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """``place`` is where the settings are changed that are not as in ``student``."""
    epochs, schedule = training["epochs"], training["scheduler"]

    def option(name: str) -> str:
        own = student is None or training[name] != student[name]
        return f"{place if own else 'training'}.{name}"

    scheduler = option("scheduler")
    milestones, name = schedule["milestones"], schedule["name"]
    if name == "multistep":
        if not milestones:
            yield f"{scheduler}.milestones: multistep needs at least one epoch, e.g. [150,180,210]"
        if sorted(set(milestones)) != list(milestones):
            yield f"{scheduler}.milestones: must rise, got {milestones}"
        late = [epoch for epoch in milestones if epoch >= epochs]
        if late:
            yield (
                f"{scheduler}.milestones: {late} lie beyond the last of {epochs} epochs; "
                f"set {option('epochs')} above {max(late)} or change them"
            )
    if schedule["warmup_epochs"] >= epochs:
        yield (
            f"{scheduler}.warmup_epochs: {schedule['warmup_epochs']:g} leaves nothing of {epochs} "
            f"epochs; set it below {option('epochs')}"
        )
    peak = training["optimizer"].get("lr")
    if name in ("linear", "cosine") and peak is not None and schedule["min_lr"] > peak:
        rate = f"{option('optimizer')}.lr={peak:g}"
        yield f"{scheduler}.min_lr: {schedule['min_lr']:g} is above {rate}"


def _batches(batch_size: int, trainer: Mapping[str, Any], place: str) -> Iterator[str]:
    processes = trainer["devices"] * trainer["num_nodes"]
    if batch_size % processes:
        yield (
            f"{place}: {batch_size} cannot be divided among {processes} processes; "
            f"change it or trainer.devices"
        )
    elif (batch_size // processes) % trainer["accumulate"]:
        yield (
            f"trainer.accumulate: {trainer['accumulate']} does not divide the "
            f"{batch_size // processes} samples of a process; change it or {place}"
        )


def _devices(trainer: Mapping[str, Any]) -> Iterator[str]:
    processes = trainer["devices"] * trainer["num_nodes"]
    if trainer["accelerator"] == "mps" and processes > 1:
        yield "trainer.devices: an mps machine has one device; set 1"
    if trainer["strategy"] == "fsdp" and processes == 1:
        yield "trainer.strategy: fsdp divides networks among processes; set trainer.devices above 1"
    if trainer["strategy"] == "fsdp" and trainer["accelerator"] in ("cpu", "mps"):
        yield "trainer.strategy: fsdp needs GPUs; set trainer.accelerator=gpu or trainer=ddp"
    if trainer["precision"] == 64 and trainer["accelerator"] == "mps":
        yield "trainer.precision: mps has no 64-bit numbers; set 32"
