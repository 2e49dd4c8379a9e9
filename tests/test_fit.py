"""Training loops: what a step computes, what is kept, and going on after an interruption."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from kdrun.errors import UserError
from kdrun.fit import CHECKPOINT, make_trainer, read_checkpoint
from kdrun.interruption import Stopped
from kdrun.method import Method
from kdrun.methods.kd import KD
from kdrun.stages.train import Supervised
from kdrun.tasks.classification import Classification
from tests.tiny import (
    StopAt,
    Training,
    composed,
    digits,
    identical,
    mlp,
    sgd,
    small_cnn,
    state_of,
)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=37)


# -- a step is what PyTorch does -------------------------------------------------------------------


def bare_loop(student: nn.Module, loss_of, epochs: int, clip: float | None = None) -> nn.Module:
    """Training as anyone would write it, on the same batches."""
    optimizer = sgd(student.parameters())
    scheduler = one_cycle(optimizer)
    loader = digits().train(batch_size=64, seed=0, device="cpu")
    student.train()
    torch.manual_seed(0)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            loss_of(student(batch.inputs), batch).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(student.parameters(), clip)
            optimizer.step()
            scheduler.step()
    return student


def cross_entropy(logits, batch):
    return F.cross_entropy(logits, batch.target)


@pytest.mark.parametrize("network", [mlp, small_cnn])
def test_supervised_training_equals_a_bare_loop_bit_for_bit(tmp_path: Path, network) -> None:
    training = Training(tmp_path, lambda: network(1), epochs=2, scheduler=one_cycle)
    ours = training.trained()
    assert identical(ours, state_of(bare_loop(network(1), cross_entropy, epochs=2)))
    assert not identical(ours, state_of(network(1)))


def test_distillation_equals_a_bare_loop_bit_for_bit(tmp_path: Path) -> None:
    teacher = small_cnn(5).eval()

    def loss_of(logits, batch):
        with torch.no_grad():
            target = teacher(batch.inputs)
        p, q = F.log_softmax(target / 4, dim=-1), F.log_softmax(logits / 4, dim=-1)
        divergence = F.kl_div(q, p, reduction="sum", log_target=True) * (16 / len(logits))
        return 0.1 * cross_entropy(logits, batch) + 0.9 * divergence

    ours = Training(
        tmp_path,
        lambda: small_cnn(1),
        KD,
        {"teacher": lambda: small_cnn(5)},
        epochs=2,
        scheduler=one_cycle,
    ).trained()
    assert identical(ours, state_of(bare_loop(small_cnn(1), loss_of, epochs=2)))


def test_clipping_equals_a_bare_loop_bit_for_bit(tmp_path: Path) -> None:
    training = Training(tmp_path, scheduler=one_cycle, clip_norm=0.1)
    ours = training.trained()
    assert identical(ours, state_of(bare_loop(mlp(1), cross_entropy, epochs=1, clip=0.1)))
    assert not identical(ours, state_of(bare_loop(mlp(1), cross_entropy, epochs=1)))


@pytest.mark.parametrize("parts", [4, 3])
def test_accumulation_gives_the_same_gradients(tmp_path: Path, parts: int) -> None:
    """Also with a last batch of 14, and where the parts are of unequal size."""
    gradients = []
    for accumulate in (1, parts):
        seen: list[torch.Tensor] = []

        def noting(parameters, seen=seen):
            optimizer = sgd(parameters)
            optimizer.register_step_pre_hook(
                lambda *_: seen.append(torch.cat([p.grad.flatten() for p in parameters]))
            )
            return optimizer

        training = Training(
            tmp_path / str(accumulate),
            method=KD,
            teachers={"teacher": lambda: mlp(2, 64)},
            optimizer=noting,
            accumulate=accumulate,
        )
        training.run()
        gradients.append(torch.stack(seen))
    whole, accumulated = gradients
    assert whole.shape == accumulated.shape == (18, mlp_size())
    torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-6)


def mlp_size() -> int:
    return sum(p.numel() for p in mlp(0).parameters())


def test_logged_terms_do_not_depend_on_accumulation(tmp_path: Path) -> None:
    teachers = {"teacher": lambda: mlp(2, 64)}
    rows = [
        Training(tmp_path / str(parts), method=KD, teachers=teachers, accumulate=parts)
        .run()
        .history[0]
        for parts in (1, 4)
    ]
    for name in ("loss", "loss/supervised", "loss/kd", "weighted/kd", "validation/loss"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [(64, 1e-3), ("bf16", 0.1)])
def test_other_precisions_train(tmp_path: Path, precision, tolerance: float) -> None:
    single = Training(tmp_path / "32", lambda: small_cnn(1), batches=6).run()
    other = Training(tmp_path / "other", lambda: small_cnn(1), batches=6, precision=precision)
    outcome = other.run()
    assert outcome.history[0]["loss"] == pytest.approx(single.history[0]["loss"], rel=tolerance)
    kind = torch.float64 if precision == 64 else torch.float32
    assert {p.dtype for p in other.distiller.parameters()} == {kind}


# -- what is written -------------------------------------------------------------------------------


def test_every_epoch_is_a_row(tmp_path: Path) -> None:
    training = Training(
        tmp_path,
        method=KD,
        teachers={"teacher": lambda: mlp(2)},
        epochs=3,
        scheduler=one_cycle,
        batches=4,
    )
    outcome = training.run()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == outcome.history
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        assert row["weighted/kd"] == pytest.approx(0.9 * row["loss/kd"])
        assert row["weighted/supervised"] == pytest.approx(0.1 * row["loss/supervised"])
        assert row["loss"] == pytest.approx(row["weighted/kd"] + row["weighted/supervised"])
        assert row["samples_per_second"] > 0 and row["seconds"] > 0
    schedule = one_cycle(sgd([nn.Parameter(torch.zeros(1))]))
    for _ in range(8):
        schedule.optimizer.step()
        schedule.step()
    assert rows[1]["learning_rate"] == pytest.approx(schedule.get_last_lr()[0])


class Scripted(Classification):
    """Validation results that were decided beforehand."""

    def __init__(self, values: list[float], direction: str = "max") -> None:
        super().__init__(num_classes=10)
        self.values, self.direction = iter(values), direction

    def compute(self, metrics) -> dict[str, float]:
        return {"accuracy": next(self.values)}


@pytest.mark.parametrize(
    ("values", "direction", "best"),
    [
        ([50.0, 70.0, 60.0], "max", 2),
        ([50.0, 70.0, 60.0], "min", 1),
        ([50.0, 70.0, 70.0], "max", 2),
        ([math.nan, 20.0, 30.0], "max", 3),
        ([20.0, math.nan, 10.0], "min", 3),
        ([math.nan, math.nan, math.nan], "max", 1),
    ],
)
def test_the_best_epoch(tmp_path: Path, values, direction, best) -> None:
    states = {}

    class Noting(Supervised):
        def after_step(self, progress) -> None:
            states[progress.epoch + 1] = state_of(training.distiller.networks["student"])

    training = Training(
        tmp_path, method=Noting, epochs=3, batches=2, task=Scripted(values, direction)
    )
    outcome = training.run()
    assert outcome.best_epoch == best
    assert identical(load_file(tmp_path / "network_best.safetensors"), states[best])
    assert identical(load_file(tmp_path / "network.safetensors"), states[3])


@pytest.mark.parametrize(("ties", "best", "epochs"), [("first", 1, 3), ("last", 2, 4)])
def test_training_ends_when_validation_no_longer_gets_better(
    tmp_path: Path, ties: str, best: int, epochs: int
) -> None:
    values = [70.0, 70.0, 60.0, 50.0, 40.0, 30.0]
    settings = {"epochs": 6, "batches": 2, "patience": 2, "ties": ties}
    training = Training(tmp_path, task=Scripted(values), **settings)
    outcome = training.run()
    assert (outcome.best_epoch, len(outcome.history)) == (best, epochs)
    assert "ends after epoch" in (tmp_path / "log.txt").read_text()
    state = state_of(training.distiller.networks["student"])
    # What was ended is not gone on with, whoever asks again.
    (tmp_path / "network.safetensors").unlink()
    again = Training(tmp_path, task=Scripted([]), **settings)
    assert len(again.run().history) == epochs
    assert identical(load_file(tmp_path / "network.safetensors"), state)


def test_patience_is_counted_on_after_a_signal(tmp_path: Path) -> None:
    values = [50.0, 70.0, 60.0, 60.0, 60.0, 60.0]
    settings = {"epochs": 6, "batches": 2, "patience": 2}
    with pytest.raises(Stopped):
        Training(tmp_path, task=Scripted(values[:3]), **settings).run(StopAt(6))
    outcome = Training(tmp_path, task=Scripted(values[3:]), **settings).run()
    assert (outcome.best_epoch, len(outcome.history)) == (2, 4)


# -- interruption ----------------------------------------------------------------------------------


class Crash(Exception):
    """The power goes."""


def crashing(method: type[Method], step: int) -> type[Method]:
    class Crashing(method):
        def after_step(self, progress) -> None:
            super().after_step(progress)
            if progress.step + 1 == step:
                raise Crash

    return Crashing


class Noisy(Supervised):
    """A method that uses every kind of state there is: generators, buffers, its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))

    def losses(self, student, teachers, batch, progress):
        noise = torch.rand(()) + random.random()
        terms = super().losses(student, teachers, batch, progress)
        self.record("noise", noise)
        return terms | {"noise": noise * self.scale * self.memory.cos() * student.logits.mean()}

    def after_step(self, progress) -> None:
        self.memory += 0.1


def noisy_training(directory: Path, method: type[Method] = Noisy, **changes) -> Training:
    def with_dropout() -> nn.Module:
        network = small_cnn(1)
        network.classifier = nn.Sequential(nn.Dropout(0.3), network.classifier)
        return network

    return Training(
        directory, with_dropout, method, epochs=2, scheduler=one_cycle, ema_decay=0.9, **changes
    )


@pytest.mark.parametrize("step", [1, 11, 18, 19, 36])
def test_a_signal_then_the_same_call_again(tmp_path: Path, step: int) -> None:
    whole = noisy_training(tmp_path / "whole")
    expected = whole.run()
    stopped = noisy_training(tmp_path / "stopped")
    with pytest.raises(Stopped):
        stopped.run(StopAt(step))
    assert stopped.distiller.step_count == step
    again = noisy_training(tmp_path / "stopped")
    outcome = again.run()
    assert_same_training(whole, expected, again, outcome)
    if step % 18 > 0:
        said = (tmp_path / "stopped" / "log.txt").read_text()
        assert f"continuing at epoch {step // 18 + 1} of 2, step {step % 18} of 18" in said


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 600.0])
@pytest.mark.parametrize("step", [7, 18, 30])
def test_a_crash_then_the_same_call_again(tmp_path: Path, step: int, checkpoint_seconds) -> None:
    """Nothing is saved when the process dies; what was saved before decides where it goes on."""
    whole = noisy_training(tmp_path / "whole")
    expected = whole.run()
    crashed = noisy_training(
        tmp_path / "crashed", crashing(Noisy, step), checkpoint_seconds=checkpoint_seconds
    )
    with pytest.raises(Crash):
        crashed.run()
    again = noisy_training(tmp_path / "crashed")
    if step <= 18 and checkpoint_seconds:  # It begins again.
        assert not (tmp_path / "crashed" / CHECKPOINT).exists()
    outcome = again.run()
    assert_same_training(whole, expected, again, outcome)


def assert_same_training(whole: Training, expected, again: Training, outcome) -> None:
    for role in ("networks", "average", "method"):
        first, second = getattr(whole.distiller, role), getattr(again.distiller, role)
        assert identical(first.state_dict(), second.state_dict()), role
    for name in ("network.safetensors", "network_best.safetensors"):
        files = [load_file(training.directory / name) for training in (whole, again)]
        assert identical(*files), name
    timing = ("seconds", "samples_per_second", "memory_mib")
    for first, second in zip(expected.history, outcome.history, strict=True):
        assert {k: v for k, v in first.items() if k not in timing} == pytest.approx(
            {k: v for k, v in second.items() if k not in timing}, rel=1e-6
        )
    assert outcome.best_epoch == expected.best_epoch
    assert outcome.gradient_shares == expected.gradient_shares


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first = noisy_training(tmp_path)
    state = first.trained()
    (tmp_path / "network.safetensors").unlink()
    again = noisy_training(tmp_path, crashing(Noisy, 1))
    outcome = again.run()
    assert identical(again.distiller.networks["student"].state_dict(), state)
    assert len(outcome.history) == 2
    assert identical(
        load_file(tmp_path / "network.safetensors"), first.distiller.average.module.state_dict()
    )


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Training(tmp_path, batches=1).run()
    with pytest.raises(UserError, match=r"last\.ckpt belongs to another configuration"):
        Training(tmp_path, batches=1, key="other").run()


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    Training(tmp_path, batches=1).run()
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "noise": b"\x00abc" * 99}[damage]
    )
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*remove it to") as caught:
        Training(tmp_path, batches=1).run()
    assert "\n" not in str(caught.value)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch) -> None:
    training = noisy_training(tmp_path / "full")
    real, calls = torch.save, []

    def fails_at_third(state, file) -> None:
        calls.append(state["step_count"])
        if len(calls) == 3:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", fails_at_third)
    training.checkpoint_seconds = 0.0
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: No space left on device"):
        training.run()
    kept = read_checkpoint(tmp_path / "full" / CHECKPOINT, "tiny")
    assert kept["step_count"] == calls[1]
    assert not list((tmp_path / "full").glob(".*tmp"))
    monkeypatch.undo()
    expected = noisy_training(tmp_path / "whole").trained()
    assert identical(noisy_training(tmp_path / "full").trained(), expected)


def test_checkpoints_hold_plain_values(tmp_path: Path) -> None:
    """They are read with ``weights_only``, so a checkpoint cannot run code."""
    noisy_training(tmp_path).run()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["epoch"] == 2 and state["step_count"] == 36


def test_a_device_that_is_not_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    options = composed("trainer=cpu").values["trainer"] | {"accelerator": "gpu"}
    with pytest.raises(UserError, match="trainer: not possible on this machine: .*gpu"):
        make_trainer(options, epochs=1)
