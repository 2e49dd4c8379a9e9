from __future__ import annotations

import pytest
import torch

from kdrun.losses.divergence import kl_divergence
from kdrun.methods.dml import DML
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import ConvNet, agreement, start

NOW = Progress(0, 1, 0, 1)


def test_every_network_learns_from_the_mean_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    outputs = [ModelOutput(one.requires_grad_()) for one in logits.unbind()]
    outputs = [ModelOutput(output.logits.detach().requires_grad_()) for output in outputs]
    method = DML(peers=2)
    assert method.roles() == {"peer1": "student", "peer2": "student"}
    batch = Batch(logits[0], torch.tensor([0, 1, 2, 3]), torch.arange(4))
    peers = {"peer1": outputs[1], "peer2": outputs[2]}
    terms = method.losses(outputs[0], peers, batch, NOW)
    for number, ending in enumerate(("", "_peer1", "_peer2")):
        others = [z for other, z in enumerate(logits.detach()) if other != number]
        expected = sum(kl_divergence(logits[number], z, t_squared=False) for z in others) / 2
        torch.testing.assert_close(terms[f"mutual{ending}"], expected.detach())
    assert set(method.weights(NOW)) == set(terms)


def test_predictions_of_the_others_are_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    student, peer = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator).unbind()
    student.requires_grad_()
    peer.requires_grad_()
    batch = Batch(student, torch.tensor([0, 1, 2, 3]), torch.arange(4))

    def mutual(own: torch.Tensor) -> torch.Tensor:
        terms = DML().losses(ModelOutput(own), {"peer1": ModelOutput(peer)}, batch, NOW)
        return terms["mutual"]

    assert torch.autograd.gradcheck(mutual, student)
    mutual(student).backward()
    assert peer.grad is None


@pytest.mark.parametrize("peers", [1, 2])
def test_training_brings_the_peers_together(data, teacher, peers) -> None:
    torch.manual_seed(0)
    student = ConvNet(width=4)
    session = start(DML(peers=peers), student, teacher, data)
    networks = [student, *(network.network for network in session.others.values())]
    assert len(networks) == 1 + peers
    before = agreement(*networks[:2], data.inputs)
    for network in networks:
        network.train()
    optimizer = torch.optim.SGD(session.parameters(), 0.05, momentum=0.9)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    mutual = []
    for rows in 3 * order.split(64)[:-1]:
        batch = Batch(data.inputs[rows], data.target[rows], data.index[rows])
        terms = session.terms(batch, NOW)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        mutual.append(terms["mutual"].item())
    assert before < 0.5
    for network in networks:
        accuracy = (network.eval()(data.inputs).argmax(1) == data.target).float().mean()
        assert accuracy > 0.85
    assert agreement(*networks[:2], data.inputs) > 0.85
