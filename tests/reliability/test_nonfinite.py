"""Numbers that go wrong: where training stops, what is told, what is kept, and skipping."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kdrun import nonfinite
from kdrun.method import Method
from kdrun.nonfinite import NonFinite
from kdrun.stages.train import Supervised
from kdrun.training_state import read_checkpoint
from tests.tiny import Training, identical, small_cnn, state_of

STEPS = 18
"""Of an epoch."""


class Backwards(torch.autograd.Function):
    """A finite value whose gradient is no number."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value * 0.0

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


class Spoilt(Supervised):
    """Supervised training with a further term that goes wrong at given steps, counted from 0."""

    def __init__(self, steps: list[int], how: str = "nan") -> None:
        super().__init__()
        self.steps, self.how = steps, how
        # No gradient of a network shows what becomes of this.
        self.own = torch.nn.Parameter(torch.ones(2))

    def losses(self, student, teachers, batch, progress) -> Mapping[str, Tensor]:
        terms = super().losses(student, teachers, batch, progress)
        extra = student.logits.square().mean() * 0.0 + self.own.sum() * 0.0
        if progress.step in self.steps:
            extra = {
                "nan": lambda: extra + math.nan,
                "inf": lambda: extra + math.inf,
                "gradient": lambda: extra + Backwards.apply(student.logits).mean(),
                "own gradient": lambda: extra + Backwards.apply(self.own).mean(),
            }[self.how]()
        return {**terms, "extra": extra}


def spoilt(directory: Path, *steps: int, how: str = "nan", **options: Any) -> Training:
    return Training(directory, method=lambda: Spoilt(list(steps), how), epochs=2, **options)


def indices_of(training: Training, step: int, epoch: int = 0) -> list[int]:
    training.train.set_epoch(epoch)
    return list(training.train)[step].index.tolist()


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("nan", "the loss term extra is nan"),
        ("inf", "the loss term extra is inf"),
        ("gradient", "the gradient of the loss term extra is not finite"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_stops_at_the_step_and_says_why(tmp_path, how, what, accumulate) -> None:
    training = spoilt(tmp_path, STEPS + 4, how=how, accumulate=accumulate)
    with pytest.raises(NonFinite) as stop:
        training.run()
    line = str(stop.value)
    assert line.startswith(f"tiny: {what} at epoch 2, step 5; its samples are listed in {tmp_path}")
    assert "\n" not in line and "last.ckpt beside it is from before" in line
    assert stop.value.exit_code == 1
    facts = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (facts["epoch"], facts["step"], facts["what"]) == (2, 5, what)
    expected = indices_of(training, 4, epoch=1)
    # Of a batch that is taken in parts, the part is known where its own loss went wrong.
    part = expected[:32] if accumulate == 2 and how != "gradient" else expected
    assert facts["samples"] == part and len(expected) == 64
    if how != "gradient":
        others = [float(value) for name, value in facts["terms"].items() if name != "extra"]
        assert facts["terms"]["extra"] == how and others and all(map(math.isfinite, others))


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_the_weights_are_those_before_the_step(tmp_path, clip_norm) -> None:
    whole = spoilt(tmp_path / "whole", batches=4, clip_norm=clip_norm)
    whole.epochs = 1
    whole.run()
    for how in ("nan", "gradient"):
        stopped = spoilt(tmp_path / how, 4, how=how, clip_norm=clip_norm)
        with pytest.raises(NonFinite, match="epoch 1, step 5; .*no checkpoint was written before"):
            stopped.run()
        # One more step than in the other, and that one was left out.
        assert identical(
            state_of(stopped.distiller.networks["student"]),
            state_of(whole.distiller.networks["student"]),
        )
        assert not (tmp_path / how / "last.ckpt").exists()


def test_the_checkpoint_before_is_kept_and_is_sound(tmp_path) -> None:
    with pytest.raises(NonFinite):
        spoilt(tmp_path, STEPS + 4, how="gradient", checkpoint_seconds=0.0).run()
    state = read_checkpoint(tmp_path / "last.ckpt", "tiny")
    assert (state["epoch"], state["position"]) == (1, 4)
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    # The same command meets the same step again; it does not run into the dark.
    with pytest.raises(NonFinite, match="epoch 2, step 5"):
        spoilt(tmp_path, STEPS + 4, how="gradient").run()


def test_what_no_loss_shows_is_found_before_it_is_saved(tmp_path) -> None:
    """A parameter of the method that no later loss depends on finitely: found one step later."""
    with pytest.raises(
        NonFinite, match=r"the update of method.own is not finite at epoch 1, step 5"
    ):
        spoilt(tmp_path, 4, how="own gradient").run()
    last = spoilt(tmp_path / "last", STEPS - 1, how="own gradient")
    with pytest.raises(NonFinite, match=r"method.own is not finite at epoch 1, step 18"):
        last.run()
    assert not (tmp_path / "last" / "last.ckpt").exists()


def test_read_late_as_on_a_gpu_it_is_the_same_step(tmp_path, monkeypatch) -> None:
    """Several steps at a time, with other steps going wrong after the first."""
    begin = nonfinite.FiniteGuard.__init__

    def late(guard: nonfinite.FiniteGuard, *arguments: Any) -> None:
        begin(guard, *arguments)
        guard._at_once = False

    monkeypatch.setattr(nonfinite.FiniteGuard, "__init__", late)
    for number, (how, what) in enumerate(
        [("nan", "the loss term extra is nan"), ("gradient", "the gradient is not finite")]
    ):
        training = spoilt(tmp_path / str(number), 3, 9, how=how)
        with pytest.raises(NonFinite, match=f"{what} at epoch 1, step 4"):
            training.run()
        facts = json.loads((tmp_path / str(number) / "nonfinite.json").read_text())
        assert facts["samples"] == indices_of(training, 3)
        assert training.distiller.step_count == STEPS, "it was not read late"
        assert not (tmp_path / str(number) / "last.ckpt").exists()


@pytest.mark.parametrize("how", ["nan", "inf", "gradient", "own gradient"])
def test_skipping_leaves_the_update_out_and_counts_it(tmp_path, how) -> None:
    training = spoilt(tmp_path, 2, 7, STEPS + 1, how=how, nonfinite="skip", student=cnn)
    outcome = training.run()
    assert [row["skipped_steps"] for row in outcome.history] == [2, 1]
    assert all(math.isfinite(value) for row in outcome.history for value in row.values())
    log = (tmp_path / "log.txt").read_text()
    assert f"tiny: 3 of {2 * STEPS} updates were left out: not finite" in log
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["skipped_steps"] for row in rows] == ["2", "1"]
    state = training.distiller.state_dict()
    assert all(value.isfinite().all() for value in state.values())


def cnn() -> torch.nn.Module:
    return small_cnn(1)


def test_a_skipped_step_changes_nothing(tmp_path) -> None:
    """Not the weights, not the momentum, not the running statistics of normalisation."""
    training = spoilt(tmp_path, nonfinite="skip", student=cnn, batches=3)
    distiller = training.start()
    seen = []

    def after_step() -> None:
        optimizer = distiller._optimizers[0].state_dict()["state"]
        momentum = {str(k): v["momentum_buffer"].clone() for k, v in optimizer.items()}
        seen.append(state_of(distiller) | momentum)

    class Watching(Training):
        def start(self):
            return distiller

    watching = Watching(tmp_path, batches=3)
    watching.train, watching.validation = training.train, training.validation
    distiller.method.steps = (1,)
    distiller.epochs = 1
    step = distiller._step

    def observed(batch) -> None:
        step(batch)
        after_step()

    distiller._step = observed
    watching.run()
    assert identical(seen[0], seen[1]) and not identical(seen[1], seen[2])


def test_nothing_is_skipped_and_no_column_added_where_nothing_goes_wrong(tmp_path) -> None:
    plain = spoilt(tmp_path / "plain")
    skipping = spoilt(tmp_path / "skipping", nonfinite="skip")
    assert identical(plain.trained(), skipping.trained())
    assert "skipped_steps" not in plain.run().history[0]


class Irregular(Method):
    """Takes its own optimiser step; the sixth is on inputs that are no numbers."""

    irregular = True

    def step(self, engine, batch, progress):
        inputs = batch.inputs * (math.nan if progress.step == 5 else 1.0)
        output = engine.forward("student", dataclasses.replace(batch, inputs=inputs))
        loss = functional.cross_entropy(output.logits, batch.target)
        engine.optimize(loss, "student")
        return {"ce": loss.detach()}


def test_irregular_steps_are_watched_too(tmp_path) -> None:
    with pytest.raises(NonFinite, match="the loss term of student is nan at epoch 1, step 6"):
        Training(tmp_path / "stop", method=Irregular).run()
    skipping = Training(tmp_path / "skip", method=Irregular, nonfinite="skip", student=cnn)
    (row,) = skipping.run().history
    assert row["skipped_steps"] == 1 and math.isfinite(row["loss"])
    assert all(value.isfinite().all() for value in skipping.distiller.state_dict().values())


@pytest.mark.slow
def test_the_options_of_every_training_name_it() -> None:
    from kdrun.catalogue import open_catalogue
    from kdrun.config import compose

    catalogue = open_catalogue()
    for name in catalogue.choices("training"):
        assert compose([f"training={name}"], catalogue).values["training"]["nonfinite"] == "stop"
