"""Whole experiments: what a run leaves, finds again, refuses and continues."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from kdrun.checkpoints import save_weights
from kdrun.data.module import DataModule
from kdrun.distiller import Distiller
from kdrun.errors import Interrupted, UserError
from kdrun.evaluation import parameter_count
from kdrun.identity import run_directory
from kdrun.models.mlp import MLP
from kdrun.models.small_cnn import SmallCNN
from kdrun.stages import training as training_stage
from tests.tiny import WORDS, digits, identical, run, tiny_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory that the runs of this module share."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[dict, Path]:
    """A finished run of kd: its result and its directory."""
    return run(root, "training.epochs=2")


def artefact(root: Path, result: dict, stage: str) -> Path:
    return root / "store" / result["artefacts"][stage]


# -- what a run leaves -----------------------------------------------------------------------------


def test_the_directory_is_named_by_its_content(root: Path, finished) -> None:
    result, directory = finished
    assert directory.parent.parent == root / "digits" / "mlp-small_cnn"
    assert directory.name == "seed0" and directory.parent.name.startswith("kd-")
    assert result["directory"] == str(directory)
    files = {file.name for file in directory.iterdir()}
    assert files >= {
        *("config.yaml", "overrides.txt", "env.json", "log.txt", "artefact.json"),
        *("last.ckpt", "metrics.csv", "training.json", "result.json"),
        "predictions.safetensors",
        *("student.safetensors", "student_best.safetensors", "predictions.safetensors"),
    }


def test_the_result(finished) -> None:
    result, directory = finished
    assert result == json.loads((directory / "result.json").read_text())
    assert result["schema"] == 1 and result["seed"] == 0 and result["protocol"] == "holdout"
    assert result["metric"] == "accuracy" and result["direction"] == "max"
    assert result["command"].startswith("kdrun ")
    assert result["data"] == digits().fingerprint
    assert (result["num_classes"], result["input_shape"]) == (10, [1, 8, 8])
    assert set(result["networks"]) == {"teacher", "alone", "distilled"}
    assert result["networks"]["teacher"]["network"] == "mlp"
    assert result["networks"]["distilled"]["network"] == "small_cnn"
    for role in ("alone", "distilled"):
        entry = result["networks"][role]
        assert entry["parameters"] == parameter_count(student())
        for epoch in ("test_last", "test_best"):
            assert set(entry[epoch]) == {
                *("accuracy", "accuracy_top5", "loss", "ece", "kl", "agreement")
            }
        assert entry["training"]["epochs"] == 2 and entry["training"]["seconds"] > 0
    training = result["networks"]["distilled"]["training"]
    assert result["objective"] == training["validation"]["best"]["accuracy"]
    assert sum(training["gradient_shares"].values()) == pytest.approx(1)


def student() -> nn.Module:
    return SmallCNN(num_classes=10, in_channels=1)


def teacher() -> nn.Module:
    return MLP(num_classes=10, input_shape=(1, 8, 8))


@torch.no_grad()
def logits(network: nn.Module, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    network.eval()
    batches = list(getattr(digits(), split)(batch_size=100, device="cpu"))
    return (
        torch.cat([network(batch.inputs) for batch in batches]),
        torch.cat([batch.target for batch in batches]),
    )


def percent(right: torch.Tensor) -> float:
    return 100 * float(right.float().mean())


def test_the_weights_in_plain_pytorch_give_the_reported_results(root: Path, finished) -> None:
    result, directory = finished
    networks = {
        ("distilled", "test_last"): directory / "student.safetensors",
        ("distilled", "test_best"): directory / "student_best.safetensors",
        ("alone", "test_last"): artefact(root, result, "alone") / "network.safetensors",
    }
    reference = teacher()
    path = artefact(root, result, "teacher") / "network.safetensors"
    reference.load_state_dict(load_file(path))
    theirs, target = logits(reference, "test")
    told = result["networks"]["teacher"]["test"]
    assert told["accuracy"] == pytest.approx(percent(theirs.argmax(1) == target))
    for (role, key), path in networks.items():
        network = student()
        network.load_state_dict(load_file(path))
        ours, _ = logits(network, "test")
        told = result["networks"][role][key]
        assert told["accuracy"] == pytest.approx(percent(ours.argmax(1) == target))
        assert told["loss"] == pytest.approx(float(nn.functional.cross_entropy(ours, target)))
        assert told["agreement"] == pytest.approx(percent(ours.argmax(1) == theirs.argmax(1)))
        kl = nn.functional.kl_div(
            ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean"
        )
        assert told["kl"] == pytest.approx(float(kl), rel=1e-4)
        assert told["ece"] == pytest.approx(calibration_error(ours, target), abs=0.01)


def calibration_error(logits: torch.Tensor, target: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent, bin by bin."""
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == target).float()
    error = 0.0
    for low in range(bins):
        inside = (confidence > low / bins) & (confidence <= (low + 1) / bins)
        if inside.any():
            gap = right[inside].mean() - confidence[inside].mean()
            error += float(inside.float().mean() * gap.abs())
    return 100 * error


def test_metrics_and_training_agree(finished) -> None:
    result, directory = finished
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    validation = result["networks"]["distilled"]["training"]["validation"]
    assert float(rows[-1]["validation/accuracy"]) == validation["last"]["accuracy"]
    best = max(float(row["validation/accuracy"]) for row in rows)
    assert best == validation["best"]["accuracy"]
    assert {"loss/kd", "weighted/kd", "loss/supervised", "weighted/supervised"} <= set(rows[0])


def test_provenance(root: Path, finished) -> None:
    _, directory = finished
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config == tiny_config(root, "training.epochs=2").values
    assert (directory / "overrides.txt").read_text() == "training.epochs=2\n"
    environment = json.loads((directory / "env.json").read_text())
    assert {"torch", "lightning", "kdrun"} <= set(environment["packages"])
    assert environment["threads"] >= 1 and environment["processor"]
    assert environment["command"] == "training.epochs=2"


def test_the_log_tells_what_happened(finished) -> None:
    _, directory = finished
    log = (directory / "log.txt").read_text()
    for text in ("teacher  epoch 2/2", "alone  epoch 1/2", "distil  epoch 2/2", "validation accur"):
        assert text in log, text
    assert "\r" not in log and "\x1b" not in log


def test_a_term_that_hardly_takes_part_is_reported(root: Path, finished) -> None:
    _, directory = run(root, "training.epochs=2", "method.supervised_weight=0.001")
    log = (directory / "log.txt").read_text()
    assert "warning: the term supervised made up 0." in log and "raise its weight" in log
    assert "warning" not in (finished[1] / "log.txt").read_text()


# -- stages are shared, runs are found again -------------------------------------------------------


def no_training(*_: object, **__: object) -> None:
    raise AssertionError("nothing should be trained")


def test_a_finished_run_is_shown_again(root: Path, finished, monkeypatch) -> None:
    monkeypatch.setattr(training_stage, "fit", no_training)
    result, directory = finished
    before = {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    again, where = run(root, "training.epochs=2")
    assert (again, where) == (result, directory)
    assert {file: file.stat().st_mtime_ns for file in directory.iterdir()} == before


def test_the_table_is_printed(root: Path, finished, capsys) -> None:
    run(root, "training.epochs=2", "trainer.progress=plain")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "finished before; rerun=true starts afresh"
    for start in ("teacher ", "alone (last)", "alone (best)", "distilled (last)"):
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1].startswith(str(root / "digits"))


def test_rerun_starts_afresh_and_gives_the_same(root: Path, finished) -> None:
    result, directory = finished
    state = load_file(directory / "student.safetensors")
    marker = (directory / "artefact.json").stat().st_mtime_ns
    (directory / "stray.txt").write_text("from before")
    again, where = run(root, "training.epochs=2", "rerun=true")
    assert where == directory and not (directory / "stray.txt").exists()
    assert (directory / "artefact.json").stat().st_mtime_ns > marker
    assert identical(load_file(directory / "student.safetensors"), state)
    for role, entry in result["networks"].items():
        for key in entry.keys() & {"test", "test_last", "test_best"}:
            assert again["networks"][role][key] == entry[key]


def test_another_method_shares_teacher_and_student_alone(root: Path, finished, monkeypatch) -> None:
    trained = []
    real = training_stage.fit

    def counting(*arguments, **keywords):
        trained.append(keywords["product"])
        return real(*arguments, **keywords)

    monkeypatch.setattr(training_stage, "fit", counting)
    result, directory = run(root, "training.epochs=2", "method=dkd")
    assert trained == ["student"]
    assert directory != finished[1]
    for stage in ("teacher", "alone"):
        assert result["artefacts"][stage] == finished[0]["artefacts"][stage]
    assert "found in the store" in (directory / "log.txt").read_text()


def test_a_changed_config_is_another_run(root: Path, finished) -> None:
    words = ["method.temperature=2", "seed=1", "training.batch_size=32"]
    places = {run_place(root, word) for word in words}
    assert len(places) == 3 and finished[1] not in places
    assert run_place(root, "seed=1").parent == finished[1].parent
    same = ["logger=tensorboard", "rerun=true", "dry=true", "trainer.progress=line"]
    assert {run_place(root, word) for word in same} == {finished[1]}


def run_place(root: Path, *words: str) -> Path:
    config = tiny_config(root, "training.epochs=2", *words)
    return run_directory(config.values, config.names)


def test_another_seed_keeps_the_teacher(root: Path, finished) -> None:
    result, _ = run(root, "training.epochs=2", "seed=1")
    assert result["artefacts"]["teacher"] == finished[0]["artefacts"]["teacher"]
    assert result["artefacts"]["alone"] != finished[0]["artefacts"]["alone"]
    assert (
        result["networks"]["distilled"]["test_last"]
        != (finished[0]["networks"]["distilled"]["test_last"])
    )


def test_alone_and_distilled_start_from_the_same_weights(root: Path) -> None:
    """With the distillation term switched off, distilling is training alone."""
    words = ("training.epochs=2", "method.weight=0", "method.supervised_weight=1")
    result, directory = run(root, *words)
    alone = load_file(artefact(root, result, "alone") / "network.safetensors")
    assert identical(load_file(directory / "student.safetensors"), alone)


def test_dry_leaves_nothing(tmp_path: Path, capsys) -> None:
    run(tmp_path, "dry=true", "trainer.progress=plain")
    told = capsys.readouterr().out
    assert "dry run: every stage ran (first start)" in told
    assert "dry run: every stage ran (again start)" in told
    assert list(tmp_path.iterdir()) == []


class Own(MLP):
    """A network of the user's own."""


def test_dry_builds_what_the_user_has_allowed(tmp_path: Path) -> None:
    run(tmp_path, "dry=true", "student=tests.test_experiment.Own")


def test_dry_finds_what_breaks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="student gives 7 logits but the data set has 10 classes"):
        run(tmp_path, "dry=true", "student.num_classes=7")


# -- protocol --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_paper_protocol_chooses_on_the_test_set(root: Path, finished) -> None:
    result, directory = run(root, "training.epochs=2", "protocol=paper")
    assert result["protocol"] == "paper"
    entry = result["networks"]["distilled"]
    for epoch in ("last", "best"):
        chosen = entry["training"]["validation"][epoch]["accuracy"]
        assert entry[f"test_{epoch}"]["accuracy"] == pytest.approx(chosen)
    assert result["artefacts"]["teacher"] != finished[0]["artefacts"]["teacher"], (
        "it trains on all of train"
    )


def test_the_test_set_is_not_touched_before_the_end(tmp_path: Path, monkeypatch) -> None:
    touched, real = [], DataModule.loader

    def noting(self, part, options):
        touched.append(part)
        return real(self, part, options)

    monkeypatch.setattr(DataModule, "loader", noting)
    run(tmp_path, "training.epochs=2")
    assert touched.count("test") == 1 and touched[-1] == "test"


# -- teachers --------------------------------------------------------------------------------------


def test_a_teacher_at_chance_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "untrained.pt"
    torch.manual_seed(0)
    torch.save(teacher().state_dict(), path)
    with pytest.raises(
        UserError, match=r"the teacher is at chance \(accuracy .* guessing gives 10"
    ):
        run(tmp_path, f"teacher.checkpoint={path}")
    result, _ = run(tmp_path, f"teacher.checkpoint={path}", "teacher.allow_chance=true")
    assert result["networks"]["teacher"]["test"]["accuracy"] < 30


def test_a_teacher_from_a_checkpoint(root: Path, finished, tmp_path: Path) -> None:
    result, _ = finished
    path = artefact(root, result, "teacher") / "network.safetensors"
    again, directory = run(tmp_path, f"teacher.checkpoint={path}", "training.epochs=2")
    told, before = (each["networks"]["teacher"] for each in (again, result))
    assert told["test"] == before["test"]
    assert told["training"]["epochs"] == 0
    assert identical(
        load_file(directory / "student.safetensors"),
        load_file(finished[1] / "student.safetensors"),
    )
    assert "teacher  epoch" not in (directory / "log.txt").read_text()


def test_a_teacher_that_is_trained_further(root: Path, finished, tmp_path: Path) -> None:
    path = artefact(root, finished[0], "teacher") / "network.safetensors"
    result, directory = run(tmp_path, f"teacher.checkpoint={path}", "teacher.finetune=true")
    assert result["networks"]["teacher"]["training"]["epochs"] == 1
    tuned = load_file(artefact(tmp_path, result, "teacher") / "network.safetensors")
    assert not identical(tuned, load_file(path))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other", r"does not fit MLP: .*\(32, 64\) in the file, \(256, 64\) in the network"),
        ("corrupt", "damaged, or not a PyTorch file"),
        ("missing", r"teacher\.checkpoint=.*: no such file"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(tmp_path: Path, kind, message) -> None:
    path = tmp_path / "weights.pt"
    if kind == "other":
        torch.save(MLP(num_classes=10, input_shape=(1, 8, 8), hidden=(32, 256)).state_dict(), path)
    elif kind == "corrupt":
        path.write_bytes(b"PK\x03\x04 nothing of use")
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, f"teacher.checkpoint={path}")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_teacher_with_the_statistics_of_each_batch(root: Path, finished) -> None:
    words = ("training.epochs=2", "teacher=small_cnn", "student=mlp")
    result, _ = run(root, *words, "teacher.mode=batch_stats")
    usual, _ = run(root, *words)
    assert result["artefacts"]["teacher"] == usual["artefacts"]["teacher"]
    accuracies = [each["networks"]["teacher"]["test"]["accuracy"] for each in (result, usual)]
    assert accuracies[0] != accuracies[1]
    students = [each["networks"]["distilled"]["test_last"]["loss"] for each in (result, usual)]
    assert students[0] != students[1]


def test_the_best_teacher_can_be_chosen(root: Path, finished) -> None:
    result, _ = run(root, "training.epochs=2", "teacher.weights=best")
    assert result["artefacts"]["teacher"] == finished[0]["artefacts"]["teacher"]


@pytest.mark.slow
def test_a_teacher_with_training_of_its_own(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "training.teacher.epochs=3", "training.teacher.batch_size=128")
    epochs = {role: e["training"]["epochs"] for role, e in result["networks"].items()}
    assert epochs == {"teacher": 3, "alone": 1, "distilled": 1}


# -- student.init_from -----------------------------------------------------------------------------


def test_a_student_starts_from_weights_and_says_which(root: Path, finished, tmp_path: Path) -> None:
    """The classifier has other classes here: what fits is taken over."""
    torch.manual_seed(3)
    source = SmallCNN(num_classes=7, in_channels=1)
    path = tmp_path / "start.safetensors"
    save_weights(source, path)
    result, directory = run(root, "training.epochs=2", f"student.init_from={path}")
    log = (directory / "log.txt").read_text()
    assert f"student.init_from: 18 of 20 tensors loaded from {path}; other shape: classifier" in log
    assert result["artefacts"]["alone"] != finished[0]["artefacts"]["alone"]
    assert result["artefacts"]["teacher"] == finished[0]["artefacts"]["teacher"]


def test_a_student_from_weights_of_something_else(tmp_path: Path) -> None:
    save_weights(nn.LSTM(3, 3), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no tensor fits SmallCNN"):
        run(tmp_path, f"student.init_from={tmp_path / 'other.safetensors'}")


# -- interruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 5), (signal.SIGINT, 54), (signal.SIGTERM, 18), (signal.SIGTERM, 94)],
)
def test_a_signal_then_the_same_command_again(
    finished, tmp_path: Path, monkeypatch, number: int, step: int
) -> None:
    """A real signal during some step of some stage; there are three of 36 steps each."""
    taken, real = [0], Distiller._step

    def signalling(self, batch) -> None:
        taken[0] += 1
        if taken[0] == step:
            os.kill(os.getpid(), number)
        real(self, batch)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Distiller, "_step", signalling)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, "training.epochs=2", "rerun=true")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert str(caught.value) == "interrupted; continue with: kdrun training.epochs=2"
    assert caught.value.exit_code == 128 + number
    assert taken[0] == step, "the step is finished, and no further one is taken"
    monkeypatch.undo()
    result, directory = run(tmp_path, "training.epochs=2")
    assert_same_run(finished, (result, directory))
    if step % 18:
        assert "continuing at epoch" in (directory / "log.txt").read_text()


def assert_same_run(expected: tuple[dict, Path], found: tuple[dict, Path]) -> None:
    (first, directory), (second, other) = expected, found
    for name in ("student.safetensors", "student_best.safetensors"):
        assert identical(load_file(directory / name), load_file(other / name)), name
    assert first["artefacts"]["teacher"] == second["artefacts"]["teacher"]
    for role, entry in first["networks"].items():
        for key in entry.keys() & {"test", "test_last", "test_best"}:
            assert second["networks"][role][key] == entry[key]


def command(root: Path, *words: str) -> list[str]:
    chosen = {word.partition("=")[0]: word for word in (*WORDS, f"output_dir={root}", *words)}
    return [sys.executable, "-m", "kdrun", *chosen.values()]


LONG = ("training.epochs=12", "training.teacher.epochs=1", "trainer.progress=plain")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    return run(tmp_path_factory.mktemp("uninterrupted"), *LONG)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_then_started_again(
    tmp_path: Path, uninterrupted, number: int
) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(tmp_path, *LONG), **pipes)
    for line in process.stdout:
        if line.startswith("distil  epoch 3/"):
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, errors
        assert "interrupted; continue with: kdrun " in errors
    again = subprocess.run(command(tmp_path, *LONG), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "distil: continuing at epoch" in again.stdout
    (path,) = (tmp_path / "digits").rglob("result.json")
    assert_same_run(uninterrupted, (json.loads(path.read_text()), path.parent))


@pytest.mark.slow
def test_two_commands_at_once_share_one_teacher(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            command(tmp_path, f"method={method}", "trainer.progress=plain"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for method in ("kd", "dkd")
    ]
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for stage in ("teacher", "alone"):
        assert sum(f"{stage}  epoch 1/1" in text for text in told) == 1
        assert sum(f"{stage}: found in the store" in text for text in told) == 1


# -- settings of the engine, end to end ------------------------------------------------------------

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "word",
    [
        pytest.param("training.ema=0.9", marks=slow),
        "trainer.precision=64",
        pytest.param("trainer.precision=bf16", marks=slow),
        "training.optimizer={_target_:torch.optim.AdamW,lr:0.003}",
        pytest.param("training.clip_norm=0.5", marks=slow),
        pytest.param("training.label_smoothing=0.1", marks=slow),
        pytest.param("trainer.accumulate=4", marks=slow),
        pytest.param("dataset.mix.mixup=0.4", marks=slow),
        pytest.param("dataset.augmentation.crop_padding=1", marks=slow),
    ],
)
def test_an_option_of_training_changes_every_network(root: Path, finished, word: str) -> None:
    result, directory = run(root, "training.epochs=2", word)
    assert directory != finished[1]
    for stage in ("teacher", "alone"):
        assert result["artefacts"][stage] != finished[0]["artefacts"][stage]
    state = load_file(directory / "student.safetensors")
    assert not identical(state, load_file(finished[1] / "student.safetensors"))
    kind = torch.float64 if word == "trainer.precision=64" else torch.float32
    assert state["classifier.weight"].dtype == kind
    assert result["networks"]["distilled"]["test_last"]["accuracy"] > 40
