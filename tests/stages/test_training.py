"""Whose training settings hold for which network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdrun.checkpoints import save_weights
from kdrun.errors import UserError
from kdrun.method import Method
from kdrun.methods.kd import KD
from kdrun.stages import distil
from kdrun.stages.distil import Distil, assemble_run
from kdrun.stages.training import optimization_of, training_settings
from tests.tiny import identical, mlp, run

ADAM = "training.teacher.optimizer={_target_:torch.optim.AdamW,lr:0.002}"
COSINE = (
    "training.teacher.scheduler={name:cosine,warmup_epochs:0,milestones:[],gamma:0.1,min_lr:0.001}"
)


class Together(Method):
    """A teacher and a second student learn with the student."""

    trainable_roles = ("teacher", "peer")

    def roles(self):
        return {"teacher": "teacher", "peer": "student"}

    def losses(self, student, teachers, batch, progress):
        return {"supervised": self.supervised_loss(student, batch)}


def optimization(context, method: Method):
    settings = training_settings(context.config, "student")
    return optimization_of(context, method, settings, steps=10)


def test_a_trained_teacher_has_its_own_optimiser_and_schedule(make_context) -> None:
    found = optimization(make_context(ADAM, COSINE, "training.epochs=2"), Together())
    assert set(found.of_roles) == {"teacher"}, "a peer is trained as the student is"
    make_optimizer, make_scheduler = found.of_roles["teacher"]
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.002
    scheduler = make_scheduler(optimizer)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001), "at the end of 2 epochs"
    assert isinstance(found.optimizer([nn.Parameter(torch.zeros(1))]), torch.optim.SGD)


def test_without_its_own_settings_it_has_the_students(make_context) -> None:
    found = optimization(make_context(), Together())
    (own,) = (make([nn.Parameter(torch.zeros(1))]) for make, _ in found.of_roles.values())
    shared = found.optimizer([nn.Parameter(torch.zeros(1))])
    assert type(own) is type(shared) and own.defaults == shared.defaults


@pytest.mark.parametrize("entry", ["epochs", "batch_size"])
def test_it_sees_the_students_batches(make_context, entry: str) -> None:
    context = make_context(f"training.teacher.{entry}=32")
    with pytest.raises(UserError, match=rf"training\.teacher\.{entry}=32: the teacher learns tog"):
        optimization(context, Together())


@pytest.mark.parametrize("word", ["training.teacher.epochs=9", "teacher.checkpoint=nowhere"])
def test_what_cannot_be_trained_is_refused_before_any_stage(tmp_path, word: str) -> None:
    with pytest.raises(UserError, match=word.replace(".", r"\.")):
        run(tmp_path, "method=bdkd", word)
    assert not list(tmp_path.rglob("*.safetensors")), "nothing was trained"


def key(monkeypatch, make_context, method: Method, *words: str) -> dict:
    monkeypatch.setattr(distil, "make_method", lambda node: method)
    return Distil().key(make_context(*words))


def test_its_settings_name_the_training(monkeypatch, make_context) -> None:
    words = (ADAM, "teacher.hidden=[8]")
    for word in words:
        ours = key(monkeypatch, make_context, Together(), word)
        assert ours != key(monkeypatch, make_context, Together())


def test_it_starts_from_its_checkpoint(monkeypatch, make_context, tmp_path) -> None:
    monkeypatch.setattr(distil, "make_method", lambda node: Together())
    start = mlp(7, 256, 256)
    save_weights(start, tmp_path / "start.safetensors")
    context = make_context(f"teacher.checkpoint={tmp_path / 'start.safetensors'}")
    teachers = assemble_run(context).teachers
    assert identical(teachers["teacher"].state_dict(), start.state_dict())
    assert not identical(
        assemble_run(make_context()).teachers["teacher"].state_dict(), start.state_dict()
    )
    gone = SimpleNamespace(**vars(make_context("teacher.checkpoint=nowhere.safetensors")))
    with pytest.raises(UserError, match=r"teacher\.checkpoint=nowhere\.safetensors: no such file"):
        assemble_run(gone)


@pytest.mark.parametrize("dataset", ["digits", "digits_few_shot"])
def test_the_pass_before_training_brings_every_labelled_sample_once(
    dataset: str, tmp_path, monkeypatch
) -> None:
    seen: list[int] = []

    def prepare(self, teachers, loader):
        seen[:] = [int(number) for batch in loader for number in batch.index]

    monkeypatch.setattr(KD, "prepare", prepare)
    # An epoch of the few draws 25 batches with replacement.
    run(tmp_path, "method=kd", f"dataset={dataset}", "training.batch_size=8", "dry=true")
    assert len(seen) == len(set(seen)) == {"digits": 1102, "digits_few_shot": 10}[dataset]
