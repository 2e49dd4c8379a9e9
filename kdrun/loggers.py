"""External loggers: Weights & Biases, TensorBoard, MLflow; imported only when they are chosen."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdrun import distributed
from kdrun.errors import UserError
from kdrun.interruption import Stopped

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

Status = Literal["success", "failed", "KILLED"]
"""How a run ended; ``KILLED`` is MLflow's word for one stopped from outside."""

FOLDER = "logs"
"""Folder of the run's directory for what loggers keep; no part of the run's product."""

ENVIRONMENT = {
    # What these packages would send home by themselves.
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow 3 writes plain files only where it is told to; its databases need more packages.
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
"""Set where the user has not set them."""

WANDB_RUN, MLFLOW_RUN = "wandb_run", "mlflow_run"
"""Files of that folder that hold what the logger calls this run."""


def check_logger(options: Mapping[str, Any]) -> None:
    """Check that the logger of the ``logger`` config group can be imported, without doing so.

    Raises:
        UserError: its package is not installed.
    """
    name = options["name"]
    if "_target_" in options and importlib.util.find_spec(name) is None:
        raise UserError(f"logger={name}: {name} is not installed: pip install 'kdrun[{name}]'")


@contextmanager
def open_loggers(
    options: Mapping[str, Any],
    directory: Path,
    shared: Path,
    hyperparameters: Mapping[str, Any],
) -> Iterator[list[Logger]]:
    """The loggers of a run for the length of a block (see ``make_loggers``), told how it ended."""
    loggers = make_loggers(options, directory, shared, hyperparameters)
    status: Status = "failed"
    try:
        yield loggers
        status = "success"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        close_loggers(loggers, status)


def make_loggers(
    options: Mapping[str, Any],
    directory: Path,
    shared: Path,
    hyperparameters: Mapping[str, Any],
) -> list[Logger]:
    """The external loggers of the ``logger`` config group; ``csv`` needs none.

    A run is one entry of the logger however often it is interrupted. No server is contacted unless
    the options name one: Weights & Biases stays offline, MLflow writes files, and the reports that
    these packages send home by themselves are turned off.

    Args:
        options: the config group.
        directory: the run's directory, which names the run too.
        shared: the folder of all runs; MLflow keeps one store for them.
        hyperparameters: what the logger notes as the run's configuration.

    Raises:
        UserError: the logger's package is not installed, or it cannot start.
    """
    from kdrun.build import instantiate

    if distributed.rank() != 0 or "_target_" not in options:
        return []
    check_logger(options)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    name = options["name"]
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    node = {key: value for key, value in options.items() if key != "name"}
    extra = _PLACEMENTS[name](node, folder, shared, "/".join(directory.parts[-4:]))
    try:
        logger = instantiate(node, **extra)
        logger.log_hyperparams(dict(hyperparameters))
        if name == "mlflow":
            (folder / MLFLOW_RUN).write_text(logger.run_id, encoding="utf-8")
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"logger={name} cannot start: {reason}") from error
    return [logger]


def close_loggers(loggers: Sequence[Logger], status: Status) -> None:
    """Have the loggers write out everything and end the run's entry."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger):
            # Lightning leaves the run open, and the next one of this process would be taken for it.
            logger.experiment.finish(exit_code=0 if status == "success" else 1)


def _wandb(node: Mapping[str, Any], folder: Path, shared: Path, title: str) -> dict[str, Any]:
    known = folder / WANDB_RUN
    if not known.exists():
        known.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return {"save_dir": str(folder), "name": title, "id": known.read_text(encoding="utf-8")}


def _tensorboard(node: Mapping[str, Any], folder: Path, shared: Path, title: str) -> dict[str, Any]:
    return {"save_dir": str(folder / "tensorboard"), "name": "", "version": ""}


def _mlflow(node: Mapping[str, Any], folder: Path, shared: Path, title: str) -> dict[str, Any]:
    extra = {"run_name": title}
    known = folder / MLFLOW_RUN
    if known.exists():
        extra["run_id"] = known.read_text(encoding="utf-8")
    if node.get("tracking_uri") is None:
        extra["tracking_uri"] = (shared / "mlflow").resolve().as_uri()
    return extra


_PLACEMENTS = {"wandb": _wandb, "tensorboard": _tensorboard, "mlflow": _mlflow}
