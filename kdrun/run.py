"""One run, from the words that were typed to its outcome."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kdrun import launch
from kdrun.build import allowing
from kdrun.catalogue import Catalogue
from kdrun.config import Config, compose
from kdrun.errors import Interrupted, UserError


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
    return run_config(compose(words, catalogue), words, flags)


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
        from kdrun.startup import import_torchmetrics

        import_torchmetrics()
        from kdrun.experiment import run_experiment

        gc.enable()
        try:
            with allowing(config.values["allow_packages"]):
                result = run_experiment(
                    config.values, names=config.names, overrides=words, command=command
                )
        except (UserError, Interrupted) as error:
            launch.report(error.exit_code)
            raise
    launch.report(0, result["objective"], result["directory"])
    return Outcome(0, result["objective"], result["directory"])


@contextlib.contextmanager
def _silent_unless_main() -> Iterator[None]:
    """Only the first of several processes prints."""
    if launch.is_main():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
