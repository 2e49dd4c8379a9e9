"""One configuration to its result: the recipe, stage by stage, in a directory named by content."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdrun import distributed
from kdrun.build import allowing, instantiate
from kdrun.data.module import DataModule
from kdrun.errors import Interrupted
from kdrun.interruption import SignalWatch, Stopped
from kdrun.logs import Console
from kdrun.process import prepare_process
from kdrun.provenance import environment
from kdrun.report.summary import summary_table
from kdrun.stages.stage import Context, Stage
from kdrun.store import Store, fingerprint, make_once, read_json, write_atomically, write_json
from kdrun.tasks.task import Task

RESULT_SCHEMA = 1
RESULT = "result.json"
NOT_IDENTITY = ("output_dir", "rerun", "dry", "logger", "seed", "allow_packages")
"""Config entries that do not change what a run computes; the seed has a folder of its own."""


def run_experiment(
    config: dict[str, Any],
    *,
    names: Mapping[str, str],
    overrides: Sequence[str],
    command: Sequence[str],
) -> dict[str, Any]:
    """Run a configuration to its end, or show the result it already has.

    Args:
        config: resolved and valid.
        names: the choice made in each config group.
        overrides: what the user changed, for the record.
        command: what repeats this run, without the leading ``kdrun``.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: something the user can mend.
        Interrupted: a signal came; the same command continues.
    """
    distributed.initialize()
    prepare_process(config["trainer"])
    console = Console(config["trainer"]["progress"])
    if config["dry"]:
        return _dry_run(config, names, overrides, command, console)
    directory = run_directory(config, names)
    key = identity(config) | {"seed": config["seed"]}
    with SignalWatch() as watch, allowing(config["allow_packages"]):

        def produce(where: Path) -> None:
            _run_stages(config, names, overrides, command, where, console, watch)

        try:
            _, found = make_once(directory, key, produce, console.say, afresh=bool(config["rerun"]))
        except Stopped as stopped:
            again = [word for word in command if not word.startswith("rerun=")]
            raise Interrupted(
                shlex.join(["kdrun", *again]), signal_number=stopped.signal_number
            ) from None
    result = read_json(directory / RESULT)
    if found:
        console.say("finished before; rerun=true starts afresh")
    console.file = None
    console.say(summary_table(result))
    console.say(str(directory))
    return result


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that determines what a run computes."""
    return {name: value for name, value in config.items() if name not in NOT_IDENTITY}


def run_directory(config: Mapping[str, Any], names: Mapping[str, str]) -> Path:
    """``<output_dir>/<dataset>/<teacher>-<student>/<method>-<hash8>/seed<k>``."""
    safe = {group: name.replace("/", "_") for group, name in names.items()}
    return Path(
        config["output_dir"],
        safe["dataset"],
        f"{safe['teacher']}-{safe['student']}",
        f"{safe['method']}-{fingerprint(identity(config), 8)}",
        f"seed{config['seed']}",
    )


def prepare_data(config: Mapping[str, Any]) -> tuple[DataModule, Task]:
    """The data set, loaded and split, and the task on it."""
    data = instantiate(dict(config["dataset"]))
    data.prepare(config["protocol"])
    smoothing = config["training"]["label_smoothing"]
    task = instantiate(
        dict(config["task"]), num_classes=data.num_classes, label_smoothing=smoothing
    )
    return data, task


def stages_of(config: Mapping[str, Any]) -> dict[str, Stage]:
    """The recipe's stages in order."""
    return {name: instantiate(dict(node)) for name, node in config["recipe"]["stages"].items()}


def _run_stages(
    config: dict[str, Any],
    names: Mapping[str, str],
    overrides: Sequence[str],
    command: Sequence[str],
    directory: Path,
    console: Console,
    watch: SignalWatch,
    limit_batches: int | None = None,
) -> None:
    began = time.time()
    main = distributed.rank() == 0
    if main:
        console.file = directory / "log.txt"
        write_atomically(directory / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_atomically(directory / "overrides.txt", "".join(f"{o}\n" for o in overrides))
        write_json(directory / "env.json", environment() | {"command": shlex.join(command)})
    data, task = prepare_data(config)
    context = Context(
        config=config,
        names=dict(names),
        data=data,
        task=task,
        store=Store(Path(config["output_dir"], "store"), console.say),
        run_directory=directory,
        console=console,
        watch=watch,
        limit_batches=limit_batches,
    )
    for name, stage in stages_of(config).items():
        watch.raise_if_received()
        stage.run(context, name)
    if main:
        facts = {
            "schema": RESULT_SCHEMA,
            "names": dict(names),
            "seed": config["seed"],
            "protocol": config["protocol"],
            "metric": task.objective,
            "direction": task.direction,
            "command": shlex.join(["kdrun", *command]),
            "directory": str(directory),
            "data": data.fingerprint,
            "artefacts": {name: artefact.name for name, artefact in context.artefacts.items()},
            "seconds": time.time() - began,
        }
        write_json(directory / RESULT, facts | context.result)


def _dry_run(
    config: dict[str, Any],
    names: Mapping[str, str],
    overrides: Sequence[str],
    command: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Every stage with one step of training, one of validation, a checkpoint and a restart."""
    folder = Path(distributed.broadcast(tempfile.mkdtemp(prefix="kdrun-dry-")))
    training = config["training"] | {"epochs": 1}
    training["teacher"] = (training["teacher"] or {}) | {"epochs": None}
    trial = config | {"output_dir": str(folder), "training": training, "dry": False}
    try:
        for attempt in ("first", "again"):
            with SignalWatch() as watch:
                directory = folder / "run"
                directory.mkdir(exist_ok=True)
                _run_stages(
                    trial, names, overrides, command, directory, console, watch, limit_batches=1
                )
            console.file = None
            console.say(f"dry run: every stage ran ({attempt} start)")
        return read_json(folder / "run" / RESULT)
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
