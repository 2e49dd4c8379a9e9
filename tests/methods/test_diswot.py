from __future__ import annotations

import pytest
import torch
from torch import nn

from kdrun.losses.affinities import channel_affinity_distance
from kdrun.losses.relations import similarity_relation
from kdrun.methods.diswot import DisWOT
from kdrun.methods.kd import KD
from kdrun.outputs import Progress
from tests.methods.training import ConvNet, agreement, start, train

NOW = Progress(0, 1, 0, 1)


def test_without_dagger_it_is_softened_logits(data, teacher, student) -> None:
    batch = data.rows(slice(16))
    session = start(DisWOT(), student, teacher, batch)
    terms = session.terms(batch, NOW)
    torch.manual_seed(0)
    expected = KD().losses(*session.forward(batch), batch, NOW)
    assert terms.keys() == expected.keys()
    torch.testing.assert_close(terms["kd"], expected["kd"])
    assert DisWOT().weights(NOW) == {"supervised": 0.1, "kd": 0.9}


def test_with_dagger_the_distances_are_losses(data, teacher) -> None:
    batch, student = data.rows(slice(16)), ConvNet(width=12)
    session = start(DisWOT(dagger=True), student, teacher, batch)
    session.student.network.eval()
    ours, theirs = session.forward(batch)
    terms = session.method.losses(ours, theirs, batch, NOW)
    maps = ours.features["stage3"], theirs["teacher"].features["stage3"]
    assert torch.equal(terms["semantic"], channel_affinity_distance(*maps))
    assert torch.equal(terms["relation"], similarity_relation(*maps))
    assert isinstance(session.method.projector, nn.Identity)


def test_a_projector_brings_the_student_to_the_teachers_width(data, teacher, student) -> None:
    session = start(DisWOT(dagger=True), student, teacher, data.rows(slice(16)))
    assert [tuple(p.shape) for p in session.method.projector.parameters()] == [
        (48, 16, 1, 1),
        (48,),
        (48,),
    ]
    assert session.total(data.rows(slice(16)), NOW).requires_grad


@pytest.mark.parametrize("dagger", [False, True])
def test_training_brings_the_student_to_the_teacher(data, teacher, student, dagger: bool) -> None:
    history = train(DisWOT(dagger=dagger), student, teacher, data, epochs=3)
    assert history[-1]["kd"] < 0.3 * history[0]["kd"]
    assert agreement(student, teacher, data.inputs) > 0.9
    if dagger:
        assert history[-1]["semantic"] < history[0]["semantic"]
