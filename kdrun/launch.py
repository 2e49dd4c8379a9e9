"""A run of several processes on this machine: the same command, once per process, by torchrun."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdrun.cores import usable_cores
from kdrun.errors import Interrupted, UserError
from kdrun.files import json_text, parse_json

OUTCOME = "KDRUN_OUTCOME"
"""Environment variable: the file in which the first process leaves its exit status and objective,
since torchrun itself says no more than that some process failed."""


def is_needed(trainer: Mapping[str, Any]) -> bool:
    """Whether the config asks for several processes and nobody has started them yet."""
    return trainer["devices"] * trainer["num_nodes"] > 1 and not is_launched()


def is_launched() -> bool:
    """Whether a launcher (torchrun, srun) started this process as one of several."""
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        return True
    # An interactive SLURM allocation sets SLURM_PROCID too, with one task.
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def is_main() -> bool:
    """Whether this process is the one that prints."""
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if is_launched() else None)
    return int(rank or 0) == 0


def launch(words: Sequence[str], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Run ``kdrun <words>`` in ``trainer.devices`` processes.

    SIGINT and SIGTERM are passed on to them; processes that have not saved and ended half a minute
    later, or when one of them has failed, are killed.

    Returns:
        ``exit_code`` and, after a finished run, ``objective``.

    Raises:
        Interrupted: a signal came before they were at work.
        UserError: several machines are asked for, which only a launcher on each of them can start.
    """
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    if nodes > 1:
        raise UserError(
            f"trainer.num_nodes={nodes}: start kdrun on every machine with srun, or with torchrun "
            f"--nnodes {nodes} --nproc-per-node {devices} --rdzv-backend c10d "
            f"--rdzv-endpoint <host> -m kdrun {shlex.join(words)}"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="kdrun-") as folder:
        outcome = Path(folder, "outcome.json")
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=Path(folder).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        )
        threads = max(1, usable_cores() // devices)
        added = {OUTCOME: str(outcome), "OMP_NUM_THREADS": str(threads)}
        added |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
        exit_code = received = 0
        # What goes wrong in a process is printed by that process.
        logging.disable(logging.ERROR)
        with _environment(added):
            try:
                elastic_launch(settings, sys.executable)("-m", "kdrun", *words)
            except ChildFailedError:
                exit_code = 1
            except SignalException as error:
                exit_code, received = 128 + error.sigval, error.sigval
            finally:
                logging.disable(logging.NOTSET)
        told = parse_json(outcome.read_bytes()) if outcome.is_file() else {}
        if received and not told:
            # Before the processes were at work; what they had saved earlier is still there.
            again = shlex.join(["kdrun", *words])
            raise Interrupted(again, signal_number=received)
        return told | {"exit_code": told.get("exit_code") or exit_code}


def report(exit_code: int, objective: float | None = None, directory: str | None = None) -> None:
    """Leave the outcome for ``launch`` in the parent process, if this is a process it started."""
    path = os.environ.get(OUTCOME)
    if path and is_main():
        told = {"exit_code": exit_code, "objective": objective, "directory": directory}
        text = json_text(told)
        Path(path).write_text(text, encoding="utf-8")


@contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside the block."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
