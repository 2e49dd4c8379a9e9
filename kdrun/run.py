"""One run, from the words that were typed to its outcome."""

from __future__ import annotations

import contextlib
import os
import shlex
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kdrun import launch
from kdrun.catalogue import Catalogue
from kdrun.config import Config, compose
from kdrun.errors import Interrupted, UserError
from kdrun.members import MEMBERS, MemberRun, member_runs
from kdrun.startup import start_computing


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit_code: the exit status.
        objective: the validation objective of a finished one; ``directory``: where it lies.
    """

    exit_code: int
    objective: float | None = None
    directory: str | None = None


def run(words: Sequence[str], flags: Sequence[str], catalogue: Catalogue) -> Outcome:
    """Compose, check and run.

    Args:
        words: ``key=value`` words.
        flags: flags typed before them (``--config-dir``), needed to repeat the command.
        catalogue: the config files.

    Raises:
        UserError: something the user can mend.
        Interrupted: a signal stopped the run after it was saved.
    """
    config = compose(words, catalogue)
    if not config.values[MEMBERS]:
        return run_config(config, words, flags)
    runs = member_runs(words, config.values[MEMBERS], catalogue)
    return run_members(runs, words, flags)


def run_config(config: Config, words: Sequence[str], flags: Sequence[str]) -> Outcome:
    """``run`` for a configuration that is composed already."""
    command = [*flags, *words]
    trainer = config.values["trainer"]
    if launch.is_needed(trainer):
        told = launch.launch(command, trainer)
        return Outcome(**told)
    with _silent_unless_main():
        for line in config.changes:
            print(line, flush=True)
        start_computing()
        from kdrun.experiment import run_experiment

        try:
            result = run_experiment(
                config.values, names=config.names, overrides=words, command=command
            )
        except (UserError, Interrupted) as error:
            launch.report(error.exit_code)
            raise
    launch.report(0, result["objective"], result["directory"])
    return Outcome(0, result["objective"], result["directory"])


def run_members(runs: Sequence[MemberRun], words: Sequence[str], flags: Sequence[str]) -> Outcome:
    """Run several configurations side by side (``members=[...]``).

    Args:
        runs: composed, and fit to go side by side.
        words: that were typed for all of them.
        flags: flags typed before them.

    Raises:
        UserError: some cannot go side by side, or have failed; the others are finished.
        Interrupted: a signal stopped them after they were saved.
    """
    start_computing()
    from kdrun.side_by_side import check_methods, run_side_by_side

    check_methods(runs)
    failed = []
    for run, ended in zip(runs, run_side_by_side(runs, flags), strict=True):
        if isinstance(ended.error, Interrupted):
            again = shlex.join(["kdrun", *flags, *words])
            raise Interrupted(again, signal_number=ended.error.exit_code - 128)
        if ended.error is not None:
            if not isinstance(ended.error, UserError):
                traceback.print_exception(ended.error)
            failed += [f"{run.label}: {ended.error}", f"  kdrun {shlex.join([*flags, *run.words])}"]
    if failed:
        counted = f"{len(failed) // 2} of {len(runs)} runs failed"
        raise UserError("\n".join([counted, *failed]), exit_code=1)
    return Outcome(0)


def run_beside(runs: Sequence[MemberRun], flags: Sequence[str]) -> list[Outcome | BaseException]:
    """Run several configurations, side by side those whose methods allow it.

    Args:
        runs: whose options allow it (``kdrun.members.group_of``); with labels of their own.
        flags: flags that the command of each needs.

    Returns:
        How each ended; what went wrong where something did.
    """
    start_computing()
    from kdrun.side_by_side import reason_to_go_alone, run_side_by_side

    beside = [run for run in runs if reason_to_go_alone(run) is None]
    groups = [beside, *([run] for run in runs if run not in beside)]
    ended = {
        run.label: end
        for group in filter(None, groups)
        for run, end in zip(group, run_side_by_side(group, flags), strict=True)
    }
    return [
        end.error or Outcome(0, end.result["objective"], end.result["directory"])
        for end in (ended[run.label] for run in runs)
    ]


@contextlib.contextmanager
def _silent_unless_main() -> Iterator[None]:
    """Only the first of several processes prints."""
    if launch.is_main():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
