from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdrun.outputs import Batch
from tests.methods.training import ConvNet, digits


@pytest.fixture(scope="session")
def data() -> Batch:
    return digits()


@pytest.fixture(scope="session")
def teacher(data: Batch) -> nn.Module:
    """A network three times as wide as the students, trained on the digits for three epochs."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvNet(width=12)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        for rows in torch.randperm(len(data), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(data.inputs[rows]), data.target[rows]).backward()
            optimizer.step()
    network.eval().requires_grad_(False)
    accuracy = (network(data.inputs).argmax(dim=1) == data.target).float().mean()
    assert accuracy > 0.95, f"the teacher of these tests did not learn: {accuracy:.3f}"
    return network


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(1)
    return ConvNet(width=4)
