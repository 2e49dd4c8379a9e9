"""The training step: frozen and trained networks, logged terms, averages, irregular methods."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdrun import distributed
from kdrun.distiller import TermSums
from kdrun.errors import UserError
from kdrun.fit import CHECKPOINT
from kdrun.method import Method
from kdrun.methods.kd import KD
from kdrun.outputs import Progress
from kdrun.stages.train import Supervised
from tests.tiny import Training, digits, identical, mlp, sgd, small_cnn, state_of

TEACHER = {"teacher": lambda: small_cnn(5)}


# -- frozen networks -------------------------------------------------------------------------------


def test_a_frozen_teacher_stays_bit_identical(tmp_path: Path) -> None:
    training = Training(tmp_path, method=KD, teachers=TEACHER, epochs=2)
    training.run()
    teacher = training.distiller.network("teacher")
    assert any("running_mean" in name for name in teacher.state_dict())
    assert identical(teacher.state_dict(), small_cnn(5).state_dict())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_frozen_teacher_is_in_no_optimiser_and_no_checkpoint(tmp_path: Path) -> None:
    training = Training(tmp_path, method=KD, teachers=TEACHER)
    training.run()
    optimised = {
        id(p)
        for optimizer in training.distiller._optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    student = training.distiller.network("student")
    assert optimised == {id(p) for p in student.parameters()}
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    names = {f"networks.student.{name}" for name in student.state_dict()}
    assert set(saved["state_dict"]) == names
    stored = load_file(tmp_path / "network.safetensors")
    assert stored.keys() == student.state_dict().keys()


def test_train_does_not_reach_a_frozen_teacher() -> None:
    distiller = Training(Path(), method=KD, teachers=TEACHER).start()
    distiller.train()
    teacher = distiller.network("teacher")
    assert distiller.network("student").training
    assert not any(module.training for module in teacher.modules())
    assert "teacher" not in "".join(name for name, _ in distiller.named_parameters())


def test_a_frozen_teacher_follows_to_another_dtype() -> None:
    distiller = Training(Path(), method=KD, teachers=TEACHER).start().double()
    assert {p.dtype for p in distiller.network("teacher").parameters()} == {torch.float64}


def test_gradients_flow_into_trained_networks_only() -> None:
    distiller = Training(Path(), method=KD, teachers=TEACHER).start()
    batch = next(iter(digits().train(batch_size=8, seed=0, device="cpu")))
    assert not distiller.forward("teacher", batch).logits.requires_grad
    assert distiller.forward("student", batch).logits.requires_grad


def test_an_unknown_role_is_named() -> None:
    distiller = Training(Path(), method=KD, teachers=TEACHER).start()
    with pytest.raises(KeyError, match="no network plays the role 'assistant'.*student, teacher"):
        distiller.network("assistant")


# -- roles that are trained ------------------------------------------------------------------------


class Mutual(Method):
    """Two networks that learn from labels, and their logits from each other."""

    trainable_roles = ("peer",)

    def roles(self):
        return {"peer": "student"}

    def losses(self, student, teachers, batch, progress):
        peer = teachers["peer"]
        return {
            "student": self.supervised_loss(student, batch),
            "peer": self.supervised_loss(peer, batch),
            "agreement": (student.logits - peer.logits).square().mean(),
        }

    def weights(self, progress: Progress):
        return {"agreement": 0.01}


def test_each_trained_role_has_its_own_optimiser_and_file(tmp_path: Path) -> None:
    training = Training(tmp_path, method=Mutual, teachers={"peer": lambda: small_cnn(2)}, batches=3)
    training.run()
    distiller = training.distiller
    assert len(distiller._optimizers) == 2
    for role, start in (("student", mlp(1)), ("peer", small_cnn(2))):
        assert not identical(distiller.network(role).state_dict(), start.state_dict())
    peer = distiller.network("peer")
    assert identical(load_file(tmp_path / "peer.safetensors"), peer.state_dict())


def test_a_trained_role_may_have_its_own_optimiser_and_schedule(tmp_path: Path) -> None:
    def make_adam(parameters):
        return torch.optim.AdamW(parameters, 1e-3)

    def make_decay(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    for scheduler, student_rate in ((None, 0.05), (make_decay, 0.05 / 8)):
        training = Training(
            tmp_path / str(student_rate),
            method=Mutual,
            teachers={"peer": lambda: small_cnn(2)},
            batches=3,
            scheduler=scheduler,
            of_roles={"peer": (make_adam, make_decay)},
        )
        training.run()
        student, peer = training.distiller._optimizers
        assert isinstance(student, torch.optim.SGD) and isinstance(peer, torch.optim.AdamW)
        assert student.param_groups[0]["lr"] == pytest.approx(student_rate)
        assert peer.param_groups[0]["lr"] == pytest.approx(1e-3 / 8), "three steps, halved at each"


class Alternating(Mutual):
    """Two losses, each for one network, in two updates a step."""

    irregular = True

    def step(self, engine, batch, progress):
        terms = {}
        for role in ("student", "peer"):
            both = {name: engine.forward(name, batch) for name in ("student", "peer")}
            terms[role] = (
                self.supervised_loss(both[role], batch)
                + (both["student"].logits - both["peer"].logits).square().mean()
            )
            engine.optimize(terms[role], role)
        return terms


def test_an_irregular_step_updates_what_it_names(tmp_path: Path) -> None:
    """What a loss leaves in the other network's gradients must not reach its next update."""
    training = Training(tmp_path, method=Alternating, teachers={"peer": lambda: mlp(2)}, batches=5)
    outcome = training.run()
    student, peer = mlp(1), mlp(2)
    optimizers = {"student": sgd(student.parameters()), "peer": sgd(peer.parameters())}
    loader = digits().train(batch_size=64, seed=0, device="cpu")
    loader.set_epoch(0)
    for batch, _ in zip(loader, range(5), strict=False):
        for role, optimizer in optimizers.items():
            logits = {"student": student(batch.inputs), "peer": peer(batch.inputs)}
            loss = nn.functional.cross_entropy(logits[role], batch.target)
            loss = loss + (logits["student"] - logits["peer"]).square().mean()
            for other in optimizers.values():
                other.zero_grad()
            loss.backward()
            optimizer.step()
    assert identical(training.distiller.network("student").state_dict(), state_of(student))
    assert identical(training.distiller.network("peer").state_dict(), state_of(peer))
    assert set(outcome.history[0]) >= {"loss/student", "loss/peer"}


def test_an_irregular_step_cannot_train_a_frozen_network(tmp_path: Path) -> None:
    class Wrong(Method):
        irregular = True

        def step(self, engine, batch, progress):
            loss = engine.forward("student", batch).logits.mean()
            engine.optimize(loss, "teacher")
            return {"loss": loss}

    with pytest.raises(UserError, match="teacher is frozen: it has no optimiser"):
        Training(tmp_path, method=Wrong, teachers=TEACHER, batches=1).run()


# -- averaged student ------------------------------------------------------------------------------


def test_the_average_is_what_is_evaluated_and_shipped(tmp_path: Path) -> None:
    decay, states = 0.8, []

    class Noting(Supervised):
        def after_step(self, progress) -> None:
            states.append(state_of(training.distiller.network("student")))

    training = Training(tmp_path, lambda: small_cnn(1), Noting, batches=6, ema_decay=decay)
    outcome = training.run()
    average = dict(states[0])  # It starts as a copy of the network after the first step.
    for state in states[1:]:
        for name, value in state.items():
            average[name] = torch.lerp(average[name].float(), value.float(), 1 - decay)
    shipped = load_file(tmp_path / "network.safetensors")
    for name, value in average.items():
        if value.is_floating_point() and not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(shipped[name], value, rtol=1e-5, atol=1e-6)
    assert not identical(shipped, states[-1])
    network = small_cnn(0)
    network.load_state_dict(shipped)
    assert accuracy(network.eval()) == pytest.approx(outcome.history[-1]["validation/accuracy"])


def test_without_an_average_the_last_weights_are_shipped(tmp_path: Path) -> None:
    training = Training(tmp_path, lambda: small_cnn(1), batches=3)
    state = training.trained()
    assert identical(load_file(tmp_path / "network.safetensors"), state)


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """On the validation split, in percent."""
    right = [
        (network(batch.inputs).argmax(1) == batch.target).float()
        for batch in digits().validation(batch_size=256, device="cpu")
    ]
    return 100 * float(torch.cat(right).mean())


# -- terms -----------------------------------------------------------------------------------------


class Terms(Supervised):
    """Terms of known size whose weights change with the epoch."""

    def losses(self, student, teachers, batch, progress):
        base = super().losses(student, teachers, batch, progress)
        self.record("batch size", torch.tensor(float(len(batch))))
        return base | {"constant": torch.tensor(2.0), "step": torch.tensor(float(progress.step))}

    def weights(self, progress: Progress):
        return {"constant": 10.0 if progress.epoch else 1.0, "step": -1.0}


def test_terms_are_logged_plain_and_weighted(tmp_path: Path) -> None:
    first, second = Training(tmp_path, method=Terms, epochs=2, batches=4).run().history
    assert first["loss/constant"] == second["loss/constant"] == 2.0
    assert (first["weighted/constant"], second["weighted/constant"]) == (2.0, 20.0)
    assert (first["loss/step"], second["loss/step"]) == (1.5, 5.5)
    assert second["weighted/step"] == -5.5
    assert second["loss"] == pytest.approx(second["weighted/supervised"] + 20.0 - 5.5)
    assert first["batch size"] == 64


def test_weights_that_change_at_every_step() -> None:
    sums = TermSums()
    for step in range(5):
        terms = {"a": torch.tensor(float(step)), "b": torch.tensor(1.0)}
        total = sums.add(terms, {"a": step / 10, "b": 2.0}, {})
        assert float(total) == pytest.approx(step * step / 10 + 2)
    means = sums.read()
    assert means["loss/a"] == 2.0 and means["loss/b"] == 1.0
    assert means["weighted/a"] == pytest.approx((0 + 1 + 4 + 9 + 16) / 50)
    assert means["loss"] == pytest.approx(means["weighted/a"] + 2.0)
    assert sums.read() == means, "reading must not change the sums"


def test_saved_sums_go_on() -> None:
    sums, copied = TermSums(), TermSums()
    sums.add({"a": torch.tensor(1.0)}, {"a": 0.5}, {"note": torch.tensor(3.0)})
    copied.load_state_dict(copy.deepcopy(sums.state_dict()), torch.device("cpu"))
    for each in (sums, copied):
        each.add({"a": torch.tensor(2.0)}, {"a": 2.0}, {"note": torch.tensor(5.0)})
    assert (
        sums.read()
        == copied.read()
        == {
            "loss": 2.25,
            "loss/a": 1.5,
            "weighted/a": 2.25,
            "note": 4.0,
        }
    )


@pytest.mark.parametrize(
    ("terms", "weights", "message"),
    [
        ({"b": 1.0}, {}, "loss terms changed from .*'a'.* to .*'b'"),
        ({"a": 1.0, "b": 1.0}, {}, "loss terms changed"),
    ],
)
def test_terms_may_not_change_within_an_epoch(terms, weights, message) -> None:
    sums = TermSums()
    sums.add({"a": torch.tensor(1.0)}, {}, {})
    with pytest.raises(ValueError, match=message):
        sums.add({name: torch.tensor(value) for name, value in terms.items()}, weights, {})
    sums.reset()
    sums.add({name: torch.tensor(value) for name, value in terms.items()}, weights, {})


def test_a_weight_without_a_term_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"weights for terms that do not exist: \['kd'\]"):
        TermSums().add({"a": torch.tensor(1.0)}, {"kd": 2.0}, {})


def test_gradient_shares_at_the_first_step(tmp_path: Path) -> None:
    class Known(Supervised):
        """Gradients that differ by known factors."""

        def losses(self, student, teachers, batch, progress):
            loss = self.supervised_loss(student, batch)
            return {"one": loss, "three": 3 * loss, "none": torch.tensor(5.0)}

        def weights(self, progress):
            return {"three": -2.0}

    outcome = Training(tmp_path, method=Known, batches=2).run()
    assert outcome.gradient_shares == pytest.approx({"one": 1 / 7, "three": 6 / 7, "none": 0.0})


def test_measuring_the_shares_does_not_change_the_training(tmp_path: Path, monkeypatch) -> None:
    arguments = {"method": KD, "teachers": TEACHER, "batches": 3}
    measured = Training(tmp_path / "measured", **arguments).trained()
    training = Training(tmp_path / "not", **arguments)
    monkeypatch.setattr(
        "kdrun.distiller.Distiller._measure_gradients", lambda *_: {"supervised": 1.0, "kd": 1.0}
    )
    assert identical(measured, training.trained())


def test_recorded_values_are_means_over_the_epoch(tmp_path: Path) -> None:
    class Recording(Supervised):
        def losses(self, student, teachers, batch, progress):
            self.record("number", torch.tensor(float(progress.step)))
            return super().losses(student, teachers, batch, progress)

    first, second = Training(tmp_path, method=Recording, epochs=2, batches=4).run().history
    assert (first["number"], second["number"]) == (1.5, 5.5)
    said = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "number" in said


# -- where training stands -------------------------------------------------------------------------


def test_methods_are_told_where_training_stands(tmp_path: Path) -> None:
    seen = []

    class Watching(Supervised):
        def losses(self, student, teachers, batch, progress):
            seen.append(progress)
            return super().losses(student, teachers, batch, progress)

    Training(tmp_path, method=Watching, epochs=2, batches=3, accumulate=2).run()
    assert [p.step for p in seen[::2]] == list(range(6)) == [p.step for p in seen[1::2]]
    assert [p.epoch for p in seen[::2]] == [0, 0, 0, 1, 1, 1]
    assert {(p.epochs, p.steps) for p in seen} == {(2, 6)}
    assert seen[-1].fraction == 5 / 6


@pytest.mark.parametrize(
    ("accumulate", "sizes"),
    [(1, [[4], [5]]), (4, [[1, 1, 1, 1], [1, 1, 1, 2]]), (8, [[1, 1, 1, 1], [1, 1, 1, 2]])],
)
def test_ranks_cut_a_short_batch_into_as_many_parts(
    tmp_path: Path, monkeypatch, accumulate: int, sizes: list[list[int]]
) -> None:
    """Nine samples of two ranks; in each part the ranks wait for each other."""
    distiller = Training(tmp_path, accumulate=accumulate).start()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    distiller.global_batch = lambda position: 9
    batch = next(iter(digits().train(batch_size=9, seed=0, device="cpu")))
    for rows, expected in zip((slice(4), slice(4, 9)), sizes, strict=True):
        parts = distiller._parts(batch.rows(rows))
        assert [len(part) for part in parts] == expected
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index[rows])


def test_views_go_through_every_network(tmp_path: Path) -> None:
    shapes = []

    class TwoViews(KD):
        views = ("strong",)

        def losses(self, student, teachers, batch, progress):
            for output in (student, teachers["teacher"]):
                strong = output.views["strong"].logits
                shapes.append(strong.shape)
                assert not torch.equal(strong, output.logits)
            assert student.views["strong"].logits.requires_grad
            assert not teachers["teacher"].views["strong"].logits.requires_grad
            return super().losses(student, teachers, batch, progress)

    Training(tmp_path, method=TwoViews, teachers=TEACHER, batches=2).run()
    assert shapes == [(64, 10)] * 4
