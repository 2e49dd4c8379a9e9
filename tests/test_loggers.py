"""External loggers: really written, offline, one entry for each run."""

from __future__ import annotations

import importlib.util
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kdrun import loggers
from kdrun.errors import UserError
from kdrun.interruption import Stopped
from kdrun.loggers import FOLDER, check_logger, make_loggers, open_loggers
from tests.tiny import WORDS, composed

CONFIGS = sorted((Path(__file__).parents[1] / "conf" / "logger").glob("*.yaml"))
OPTIONS = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS}
HYPERPARAMETERS = {"method": {"temperature": 4.0}, "seed": 0, "student": {"widths": [4, 8]}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of a run called ``digits/a-b/kd-0/seed0``."""
    path = tmp_path / "outputs" / "digits" / "a-b" / "kd-0" / "seed0"
    path.mkdir(parents=True)
    return path


def opened(name: str, directory: Path, **changes):
    shared = directory.parents[3]
    return open_loggers(OPTIONS[name] | changes, directory, shared, HYPERPARAMETERS)


def log_two_sittings(name: str, directory: Path) -> None:
    """A run that is interrupted after its first epoch and finishes in a second sitting."""
    with pytest.raises(Stopped), opened(name, directory) as (logger,):
        logger.log_metrics({"distil/loss/total": 2.0, "distil/loss/kd": 1.5}, step=18)
        raise Stopped(15)
    with opened(name, directory) as (logger,):
        logger.log_metrics({"distil/loss/total": 1.0, "distil/loss/kd": 0.5}, step=36)
        logger.log_metrics({"distilled/test_last/accuracy": 91.5})


# -- what needs no package -------------------------------------------------------------------------


def test_csv_needs_nothing(directory: Path) -> None:
    with opened("csv", directory) as opened_loggers:
        assert opened_loggers == []
    assert list(directory.iterdir()) == []


def test_other_ranks_log_nothing(directory: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert make_loggers(OPTIONS["tensorboard"], directory, directory, {}) == []


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow"])
def test_a_missing_package_is_one_line(directory: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    message = f"logger={name}: {name} is not installed: pip install 'kdrun\\[{name}\\]'"
    with pytest.raises(UserError, match=message):
        check_logger(OPTIONS[name])
    with pytest.raises(UserError, match=message):
        make_loggers(OPTIONS[name], directory, directory, {})
    assert list(directory.iterdir()) == []


@pytest.mark.slow
def test_a_logger_that_cannot_start_is_one_line(directory: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(UserError, match="logger=mlflow cannot start: ") as caught:
        make_loggers(
            OPTIONS["mlflow"] | {"tracking_uri": "nonsense://nowhere"}, directory, directory, {}
        )
    assert "\n" not in str(caught.value)


# -- TensorBoard -----------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_tensorboard(directory: Path) -> None:
    pytest.importorskip("tensorboard")
    log_two_sittings("tensorboard", directory)
    folder = directory / FOLDER / "tensorboard"
    found = scalars(folder)
    assert found["distil/loss/total"] == [(18, 2.0), (36, 1.0)]
    assert found["distilled/test_last/accuracy"][0][1] == 91.5
    assert "hp_metric" not in found
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["method"]["temperature"] == 4.0


# -- MLflow ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mlflow(directory: Path) -> None:
    pytest.importorskip("mlflow")
    log_two_sittings("mlflow", directory)
    from mlflow.tracking import MlflowClient

    client = MlflowClient((directory.parents[3] / "mlflow").as_uri())
    (experiment,) = (e for e in client.search_experiments() if e.name == "kdrun")
    (entry,) = client.search_runs([experiment.experiment_id])
    assert entry.info.run_name == "digits/a-b/kd-0/seed0"
    assert entry.info.status == "FINISHED"
    history = client.get_metric_history(entry.info.run_id, "distil/loss/total")
    assert [(point.step, point.value) for point in history] == [(18, 2.0), (36, 1.0)]
    assert entry.data.metrics["distilled/test_last/accuracy"] == 91.5
    assert entry.data.params["method/temperature"] == "4.0"


@pytest.mark.slow
def test_mlflow_is_told_how_a_run_ended(directory: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    seen = []
    for error in (Stopped(15), RuntimeError("broken")):
        with pytest.raises(type(error)), opened("mlflow", directory) as (logger,):
            logger.log_metrics({"x": 1.0}, step=1)
            raise error
        client = MlflowClient((directory.parents[3] / "mlflow").as_uri())
        seen.append(client.get_run((directory / FOLDER / loggers.MLFLOW_RUN).read_text()))
    assert [entry.info.status for entry in seen] == ["KILLED", "FAILED"]
    assert seen[0].info.run_id == seen[1].info.run_id


# -- Weights & Biases ------------------------------------------------------------------------------


def records(content: bytes) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: a header of 7 bytes, then LevelDB's log format."""
    position, pieces = 7, []
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack_from("<HB", content, position + 4)
        pieces.append(content[position + 7 : position + 7 + size])
        position += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield b"".join(pieces)
            pieces = []


def history(run_folder: Path) -> list[dict[str, str]]:
    """What an offline run of Weights & Biases has stored, row by row."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run_folder.glob("*.wandb")
    rows = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): item.value_json for item in items})
    return rows


@pytest.mark.slow
def test_wandb_offline(directory: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_two_sittings("wandb", directory)
    folder = directory / FOLDER / "wandb"
    sittings = sorted(folder.glob("offline-run-*"))
    assert len(sittings) == 2
    # Both are sittings of one run: they have its id.
    assert len({sitting.name.rpartition("-")[2] for sitting in sittings}) == 1
    rows = [row for sitting in sittings for row in history(sitting)]
    losses = [float(row["distil/loss/total"]) for row in rows if "distil/loss/total" in row]
    assert losses == [2.0, 1.0]
    assert [row["trainer/global_step"] for row in rows][:2] == ["18", "36"]


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_run_contacts_nobody(tmp_path: Path, name: str) -> None:
    """Every request of the logger would go through a proxy, at which nobody knocks."""
    pytest.importorskip(name)
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.settimeout(0.0)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        variables = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy")
        # What runs in CI is taken for a test by MLflow, which then sends nothing anyway.
        kept = os.environ.keys() - {"CI", "no_proxy", "NO_PROXY"}
        environment = {name: os.environ[name] for name in kept} | dict.fromkeys(variables, address)
        words = [*WORDS, f"output_dir={tmp_path}", f"logger={name}"]
        done = subprocess.run(
            [sys.executable, "-m", "kdrun", *words], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert any((tmp_path / "digits").rglob(FOLDER))
    assert (tmp_path / "mlflow").is_dir() == (name == "mlflow")


@pytest.mark.slow
def test_csv_imports_no_logger(tmp_path: Path) -> None:
    words = [*WORDS, f"output_dir={tmp_path}", "dry=true"]
    code = (
        "import sys\nfrom kdrun import cli\n"
        f"assert cli.run({words!r}) == 0\n"
        "found = {'wandb', 'tensorboard', 'mlflow', 'torch.utils.tensorboard'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_configs_say_what_kdrun_fills_in() -> None:
    for name, options in OPTIONS.items():
        assert options["name"] == name
        assert composed(f"logger={name}").values["logger"] == options
