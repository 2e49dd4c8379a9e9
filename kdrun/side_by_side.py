"""Several runs side by side in this process, each as it would go by itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from kdrun.assembly import build_untrained, make_method
from kdrun.build import allowing
from kdrun.data.module import DataModule
from kdrun.errors import ConfigErrors, Interrupted
from kdrun.evaluation import evaluation_device, parameter_count
from kdrun.experiment import prepare_data, run_experiment
from kdrun.interruption import SignalWatch
from kdrun.lockstep import Ended, Lockstep, Member
from kdrun.members import AT_ONCE, MemberRun
from kdrun.process import free_memory, use_one_arena
from kdrun.stages.sharing import why_apart
from kdrun.stages.training import training_settings
from kdrun.validation import optimizer_states

SHARE_OF_MEMORY = 0.5
"""Of the memory that is free, what the students of one group may take; the rest is for activations
and for what a method keeps."""

Result = dict[str, Any]


def check_methods(runs: Sequence[MemberRun]) -> None:
    """Make sure that every method learns from teachers that others can share.

    Raises:
        ConfigErrors: one line for each that does not.
    """
    problems = []
    for run in runs:
        reason = reason_to_go_alone(run)
        if reason is not None:
            method = run.config.names["method"]
            problems.append(f"members, {run.label}: method={method} {reason}; run it by itself")
    if problems:
        raise ConfigErrors(problems)


def reason_to_go_alone(run: MemberRun) -> str | None:
    """What about a run's method keeps it from sharing teachers; None: nothing."""
    values = run.config.values
    with allowing(values["allow_packages"]):
        return why_apart(make_method(values["method"]))


def run_side_by_side(runs: Sequence[MemberRun], flags: Sequence[str]) -> list[Ended[Result]]:
    """Run several configurations, as many at once as ``members_at_once`` and memory allow.

    Args:
        runs: fit to go side by side.
        flags: flags that the command of each needs.

    Returns:
        How each ended, in their order: the content of its ``result.json``, or the error. One that
        fails does not keep the others from going on.
    """
    ended: list[Ended[Result]] = []
    with SignalWatch() as watch:
        for group in _groups(runs):
            if watch.received:
                stop = Interrupted(shlex.join(["kdrun", *flags]), signal_number=watch.received)
                ended += [Ended(error=stop)] * len(group)
            else:
                ended += _run_group(group, flags)
    return ended


def _run_group(runs: Sequence[MemberRun], flags: Sequence[str]) -> list[Ended[Result]]:
    if len(runs) == 1:
        return [_run_alone(runs[0], flags)]
    # Every thread would keep freed memory for itself.
    use_one_arena()
    lockstep = Lockstep([run.label for run in runs])
    of_member = dict(zip(lockstep.members, runs, strict=True))

    return lockstep.run(lambda member: _run(of_member[member], flags, member))


def _run_alone(run: MemberRun, flags: Sequence[str]) -> Ended[Result]:
    try:
        return Ended(result=_run(run, flags))
    except (Exception, SystemExit) as error:
        return Ended(error=error)


def _run(run: MemberRun, flags: Sequence[str], member: Member | None = None) -> Result:
    return run_experiment(
        run.config.values,
        names=run.config.names,
        overrides=run.words,
        command=[*flags, *run.words],
        member=member,
    )


# -- memory ----------------------------------------------------------------------------------------


def _groups(runs: Sequence[MemberRun]) -> Iterator[Sequence[MemberRun]]:
    """The runs in groups that fit into memory together."""
    limit = runs[0].config.values[AT_ONCE]
    if limit is None and len(runs) > 1:
        limit = _fitting(runs)
    size = limit or 1
    for first in range(0, len(runs), size):
        yield runs[first : first + size]


def _fitting(runs: Sequence[MemberRun]) -> int:
    """How many of the runs fit into memory at once, at least one."""
    values = runs[0].config.values
    with allowing(values["allow_packages"]):
        data, _ = prepare_data(values)
        largest = max(student_bytes(run.config.values, data) for run in runs)
    free = free_memory(evaluation_device(values["trainer"]["accelerator"]))
    return max(1, int(SHARE_OF_MEMORY * free / largest))


def student_bytes(config: Mapping[str, Any], data: DataModule) -> int:
    """Memory that a student in training holds between two of its steps.

    Weights, what the optimiser keeps, and the average; gradients and activations are gone when it
    is another run's turn.
    """
    settings = training_settings(config, "student")
    with torch.device("meta"):
        network = build_untrained(config["student"], data, config["seed"])
    copies = 1 + optimizer_states(settings) + (settings["ema"] is not None)
    width = 8 if config["trainer"]["precision"] == 64 else 4
    return parameter_count(network) * width * copies
