"""One configuration to its result: the recipe, stage by stage, in a directory named by content."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdrun import distributed
from kdrun.artefacts import RESULT, RESULT_SCHEMA
from kdrun.build import allowing, instantiate, resolve
from kdrun.data.module import DataModule
from kdrun.errors import Interrupted, UserError
from kdrun.files import read_json, write_atomically, write_json
from kdrun.identity import identity, run_directory
from kdrun.interruption import SignalWatch, Stopped
from kdrun.lockstep import Member
from kdrun.loggers import check_logger, open_loggers
from kdrun.logs import Console
from kdrun.process import prepare_process
from kdrun.provenance import environment
from kdrun.redaction import remember_secrets
from kdrun.report.summary import summary_table
from kdrun.stages.stage import Context, Stage
from kdrun.startup import collector_paused
from kdrun.store import Store, make_once
from kdrun.targets import KEY
from kdrun.tasks.task import Task


def run_experiment(
    config: dict[str, Any],
    *,
    names: Mapping[str, str],
    overrides: Sequence[str],
    command: Sequence[str],
    member: Member | None = None,
) -> dict[str, Any]:
    """Run a configuration to its end, or show the result it already has.

    Args:
        config: resolved and valid.
        names: the choice made in each config group.
        overrides: what the user changed, for the record.
        command: what repeats this run, without the leading ``kdrun``.
        member: this run among those that go side by side with it; None: it goes alone.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: something the user can mend.
        Interrupted: a signal came; the same command continues.
    """
    distributed.initialize()
    remember_secrets(config)
    prepare_process(config["trainer"])
    console = Console(config["trainer"]["progress"], label=member.label if member else "")
    perform = _dry_run if config["dry"] else _stored_run
    with allowing(config["allow_packages"]):
        return perform(config, names, overrides, command, console, member)


def _stored_run(
    config: dict[str, Any],
    names: Mapping[str, str],
    overrides: Sequence[str],
    command: Sequence[str],
    console: Console,
    member: Member | None,
) -> dict[str, Any]:
    """The result in the run's directory, made where there is none."""
    directory = run_directory(config, names)
    key = identity(config) | {"seed": config["seed"]}
    with SignalWatch() as watch:

        def produce(where: Path) -> None:
            _run_stages(config, names, overrides, command, where, console, watch, member)

        try:
            _, found = make_once(
                directory,
                key,
                produce,
                console.say,
                _while_waiting(watch, member),
                afresh=bool(config["rerun"]),
            )
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


def prepare_data(config: Mapping[str, Any]) -> tuple[DataModule, Task]:
    """The data set, loaded and split, and the task on it.

    Raises:
        UserError: the data set cannot be had, or is for another task.
    """
    data = instantiate(dict(config["dataset"]))
    wanted = resolve(config["task"][KEY]).name
    if data.task != wanted:
        raise UserError(f"task={wanted}: this data set is for {data.task}; set task={data.task}")
    data.prepare(config["protocol"])
    data.draw_labels(config["seed"])
    _refuse_division(config, data)
    task = instantiate(
        dict(config["task"]),
        num_classes=data.num_classes,
        label_smoothing=config["training"]["label_smoothing"],
        **data.task_arguments,
    )
    return data, task


def _refuse_division(config: Mapping[str, Any], data: DataModule) -> None:
    """Check that nothing divides the batches of a data set that has only one."""
    if not data.single_batch:
        return
    trainer, batch_size = config["trainer"], config["training"]["batch_size"]
    for option in ("devices", "num_nodes", "accumulate"):
        if trainer[option] > 1:
            raise UserError(
                f"trainer.{option}={trainer[option]}: each batch of this data set is all of it and "
                "cannot be divided; set it to 1"
            )
    if batch_size < data.train_size:
        raise UserError(
            f"training.batch_size={batch_size}: each batch of this data set is all of its "
            f"{data.train_size:,} samples; set it to at least that"
        )


def stages_of(config: Mapping[str, Any]) -> dict[str, Stage]:
    """The recipe's stages in order."""
    with collector_paused():  # The first of a process imports Lightning.
        return {name: instantiate(dict(node)) for name, node in config["recipe"]["stages"].items()}


def _run_stages(
    config: dict[str, Any],
    names: Mapping[str, str],
    overrides: Sequence[str],
    command: Sequence[str],
    directory: Path,
    console: Console,
    watch: SignalWatch,
    member: Member | None,
    limit_batches: int | None = None,
) -> None:
    began = time.time()
    main = distributed.rank() == 0
    if main:
        console.file = directory / "log.txt"
        _write_origin(directory, config, overrides, command)
    data, task = _prepared(config, member)
    places = directory, Path(config["output_dir"])
    with open_loggers(config["logger"], *places, identity(config)) as loggers:
        context = Context(
            config=config,
            names=dict(names),
            data=data,
            task=task,
            store=Store(
                Path(config["output_dir"], "store"), console.say, _while_waiting(watch, member)
            ),
            run_directory=directory,
            console=console,
            watch=watch,
            loggers=loggers,
            limit_batches=limit_batches,
            member=member,
        )
        stages = stages_of(config)
        for stage in stages.values():
            stage.check(config, data)
        for number, (name, stage) in enumerate(stages.items()):
            # All ranks leave together: one that has not heard yet would wait for the others.
            watch.received = max(distributed.gather_objects(watch.received))
            watch.raise_if_received()
            if member is not None:
                member.enter_stage(number)
            stage.run(context, name)
            if main:
                # Before there is a result: what an unfinished run refers to is not thrown away.
                used = {name: artefact.name for name, artefact in context.artefacts.items()}
                write_json(directory / "artefacts.json", used)
        for logger in loggers:
            logger.log_metrics(dict(flat_results(context.result)))
    if main:
        result = _facts(context, data, command) | {"seconds": time.time() - began} | context.result
        write_json(directory / RESULT, result)


def _write_origin(
    directory: Path, config: dict[str, Any], overrides: Sequence[str], command: Sequence[str]
) -> None:
    """What is needed to do the run again."""
    write_atomically(directory / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    write_atomically(directory / "overrides.txt", "".join(f"{o}\n" for o in overrides))
    write_json(directory / "env.json", environment() | {"command": shlex.join(command)})


def _facts(context: Context, data: DataModule, command: Sequence[str]) -> dict[str, Any]:
    """What ``result.json`` tells of every run.

    Args:
        context: the run after its last stage.
        data: the data set as it was before any stage.
        command: what repeats the run.
    """
    config, task, member = context.config, context.task, context.member
    return {
        "schema": RESULT_SCHEMA,
        "names": context.names,
        "seed": config["seed"],
        "data_seed": config["data_seed"],
        "side_by_side": 1 if member is None else member.companions,
        "protocol": config["protocol"],
        "metric": task.objective,
        "direction": task.direction,
        "command": shlex.join(["kdrun", *command]),
        "directory": str(context.run_directory),
        "data": data.fingerprint,
        "num_classes": data.num_classes,
        "input_shape": data.input_shape,
        "artefacts": {name: artefact.name for name, artefact in context.artefacts.items()},
        # What a recipe without an evaluation leaves.
        "networks": {},
        "objective": None,
    }


def _prepared(config: Mapping[str, Any], member: Member | None) -> tuple[DataModule, Task]:
    """``prepare_data``, once for all runs that go side by side and have the same data."""
    if member is None:
        return prepare_data(config)
    # What data and task depend on and these runs do not have in common anyway.
    own = [config["training"]["label_smoothing"]]
    if resolve(config["dataset"][KEY]).draw_labels is not DataModule.draw_labels:
        own.append(config["seed"])
    return member.share(("data", *own), lambda: prepare_data(config))


def _while_waiting(watch: SignalWatch, member: Member | None) -> Callable[[], None]:
    """What to do, again and again, while another run makes what this one wants."""

    def let_others_go_on() -> None:
        watch.raise_if_received()
        if member is not None:
            member.wait_for_lock()

    return let_others_go_on


def flat_results(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The test results of all networks under flat names: ``distilled/test_last/accuracy``."""
    for role, entry in result.get("networks", {}).items():
        for key in ("test", "test_last", "test_best"):
            for metric, value in entry.get(key, {}).items():
                yield f"{role}/{key}/{metric}", value


def _dry_run(
    config: dict[str, Any],
    names: Mapping[str, str],
    overrides: Sequence[str],
    command: Sequence[str],
    console: Console,
    member: Member | None,
) -> dict[str, Any]:
    """Every stage with one step of training, one of validation, a checkpoint and a restart."""
    folder = Path(distributed.broadcast(tempfile.mkdtemp(prefix="kdrun-dry-")))
    training = config["training"] | {"epochs": 1}
    training["teacher"] = (training["teacher"] or {}) | {"epochs": None}
    # A trial leaves no entry in a logger, but the logger's package must be there.
    check_logger(config["logger"])
    trial = config | {"output_dir": str(folder), "training": training, "dry": False}
    trial |= {"logger": {"name": "csv"}}
    try:
        for attempt in ("first", "again"):
            with SignalWatch() as watch:
                directory = folder / "run"
                directory.mkdir(exist_ok=True)
                _run_stages(trial, names, overrides, command, directory, console, watch, member, 1)
            console.file = None
            console.say(f"dry run: every stage ran ({attempt} start)")
        return read_json(folder / "run" / RESULT)
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
