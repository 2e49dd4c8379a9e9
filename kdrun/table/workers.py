"""Several processes at work on a table, started by one of Hydra's launchers."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.catalogue import Catalogue, open_catalogue
from kdrun.errors import ConfigErrors, Interrupted
from kdrun.overrides import Override
from kdrun.table.cells import Cell, cells_of
from kdrun.table.progress import Board
from kdrun.table.request import Request, chosen_arms, chosen_table
from kdrun.table.views import Lines
from kdrun.table.work import group_runner, runner, work


@dataclass(frozen=True)
class Worker:
    """What the launcher calls in each of its processes: work on the table like anyone else.

    Attributes:
        request: what was typed.
        flags: flags that every run needs.
        directories: config folders besides kdrun's own.
        began: when the table was started; what failed since then is not tried again.
    """

    request: Request
    flags: tuple[str, ...]
    directories: tuple[str, ...]
    began: float

    def __call__(self, config: Any) -> float:
        """Work until nothing is left; returns 0.

        Raises:
            KeyboardInterrupt: a signal stopped a run after it was saved.
        """
        catalogue = open_catalogue(self.directories)
        cells = chosen_cells(self.request, catalogue)
        view = Lines(Board(cells), sys.stdout)
        try:
            work(
                cells,
                runner(catalogue, self.flags),
                view,
                began=self.began,
                fail_fast=self.request.fail_fast,
                run_group=group_runner(catalogue, self.flags),
            )
        except Interrupted:
            raise KeyboardInterrupt from None
        return 0.0


def chosen_cells(request: Request, catalogue: Catalogue) -> list[Cell]:
    """The runs that are asked for, in the order in which they are best done."""
    table = chosen_table(request, catalogue)
    return cells_of(chosen_arms(request, table, catalogue), table.seeds)


def start_workers(request: Request, flags: Sequence[str], catalogue: Catalogue) -> None:
    """Let the launcher that was typed start ``request.workers`` processes, and wait for them.

    Raises:
        ConfigErrors: its settings are wrong.
        KeyboardInterrupt: the work was interrupted.
    """
    from kdrun.sweep import multirun
    from kdrun.sweep_plan import hydra_settings

    launcher = [word for word in request.launcher if word.startswith("launcher")]
    settings, problems = hydra_settings(launcher, catalogue)
    problems += [
        f"{word}: a table has nothing to search for; it takes a launcher"
        for word in request.launcher
        if not word.startswith("launcher")
    ]
    if problems:
        raise ConfigErrors(problems)
    numbers = tuple(str(number) for number in range(request.workers))
    override = Override("worker", None, f"worker={','.join(numbers)}", numbers)
    directory = Path(request.folder, "workers", time.strftime("%Y-%m-%d_%H-%M-%S")).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    worker = Worker(
        request=request,
        flags=tuple(flags),
        directories=tuple(str(directory) for directory in catalogue.directories[1:]),
        began=time.time(),
    )
    if multirun([override], settings, directory, worker, catalogue):
        raise KeyboardInterrupt
