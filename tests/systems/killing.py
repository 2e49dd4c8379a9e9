"""Experiments in a process of their own that is killed at a given step; what they leave."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from kdrun.distiller import Distiller
from kdrun.fit import fit
from kdrun.stages import training as training_module
from tests.tiny import run


def run_and_kill(root: Path, words: tuple[str, ...], *, step: int, often: bool) -> None:
    """Run a tiny experiment in ``root`` in a forked process that is killed and cleans nothing up.

    Args:
        root: its output directory.
        words: as for ``tests.tiny.run``.
        step: number, from 1 and over all trainings, of the step in which it dies: after the
            gradient, before the update.
        often: write a checkpoint after every step, not only after every epoch.
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, status
        return
    taken, take_step, update = [0], Distiller._step, Distiller._update

    def counting(distiller: Distiller, batch: Any) -> None:
        taken[0] += 1
        take_step(distiller, batch)

    def dying(distiller: Distiller, which: Any) -> None:
        if taken[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        update(distiller, which)

    try:
        Distiller._step, Distiller._update = counting, dying
        if often:
            training_module.fit = functools.partial(fit, checkpoint_seconds=0.0)
        run(root, *words)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(1)


def weights(root: Path) -> dict[str, str]:
    """Hash of every file of weights or predictions below ``root``, by its place."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.safetensors"))
    }


def metrics_of(result: dict[str, Any]) -> dict[str, Any]:
    """The metrics of every network of a ``result.json``."""
    return {
        role: {key: values for key, values in entry.items() if key.startswith("test")}
        for role, entry in result["networks"].items()
    }
