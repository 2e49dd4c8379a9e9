from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdrun.architectures.strategy import Evaluation
from kdrun.architectures.untrained import UntrainedDistance, gaussian, respond
from kdrun.models.resnet import ResNet
from kdrun.outputs import Batch


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 8, 8, generator=generator)
    return Batch(images, torch.arange(12) % 5, torch.arange(12))


def resnet(blocks: tuple[int, ...] = (1, 1), seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet(num_classes=5, blocks=blocks, widths=(4, 8), stem_width=4)


def build(*blocks: int):
    return lambda seed: resnet(blocks, seed)


def test_the_response_is_that_of_ordinary_training(batch: Batch) -> None:
    network, other = resnet(), resnet()
    found = respond(network, batch)
    loss = F.cross_entropy(other.train()(batch.inputs), batch.target)
    loss.backward()
    torch.testing.assert_close(found.gradient, other.fc.weight.grad)
    assert torch.equal(found.weight, other.fc.weight)
    assert found.maps.shape == (12, 8, 4, 4)
    # The gradient of the mean cross-entropy is (p - y)^T f / B.
    pooled = found.maps.mean((2, 3))
    error = network(batch.inputs).softmax(1) - F.one_hot(batch.target, 5)
    torch.testing.assert_close(found.gradient, (error.T @ pooled / 12).detach())


def test_gaussian_weights() -> None:
    network = gaussian(resnet((3, 3)), seed=4)
    weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(1, abs=0.05)
    assert not network.fc.bias.any() and (network.bn1.weight == 1).all()
    again = gaussian(resnet((3, 3), seed=9), seed=4)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters()))  # noqa: B905


@pytest.mark.parametrize("semantic", ["fc_grad", "cam"])
@pytest.mark.parametrize("relation", ["batch", "first_sample_channels"])
def test_the_teacher_itself_is_at_distance_zero(batch: Batch, semantic, relation) -> None:
    scorer = UntrainedDistance(semantic=semantic, relation=relation)
    response = respond(gaussian(resnet(), 0), batch)
    assert scorer._semantic(response, response) == 0
    assert scorer._relation(response, response) == 0


@pytest.mark.parametrize("init", ["gaussian", "default"])
def test_scores_depend_on_seeds_only(batch: Batch, init: str) -> None:
    def scores(**options) -> dict[str, float]:
        return (
            UntrainedDistance(init=init, **options).seeded(0).open(build(3, 3), batch)(build(1, 1))
        )

    first = scores()
    assert first["semantic"] < 0 and first["relation"] < 0 and first["gradient_norm"] > 0
    torch.manual_seed(1234)
    assert scores() == first
    assert scores(candidate_seed=1) != first and scores(teacher_seed=1) != first
    # The same seed does not make a copy of the teacher.
    scorer = UntrainedDistance(init=init).seeded(0).open(build(1, 1), batch)
    assert scorer(build(1, 1))["semantic"] < 0


def test_repetitions_are_averaged(batch: Batch) -> None:
    def mean(name: str, repetitions: int) -> float:
        scorer = UntrainedDistance(repetitions=repetitions).seeded(0)
        return scorer.open(build(3, 3), batch)(build(1, 1))[name]

    one, three = mean("semantic", 1), mean("semantic", 3)
    assert one != three and mean("semantic", 3) == three


def test_the_runs_seed_takes_the_place_of_those_not_given() -> None:
    scorer = UntrainedDistance(teacher_seed=5, combine="semantic").seeded(3)
    assert (scorer.batch_seed, scorer.teacher_seed, scorer.candidate_seed) == (3, 5, 3)
    assert scorer.combine == "semantic"


def test_how_scores_are_combined() -> None:
    found = [
        Evaluation((i,), {"semantic": s, "relation": r})
        for i, (s, r) in enumerate([(-0.5, -0.001), (-0.1, -0.004), (-0.3, -0.002)])
    ]
    assert UntrainedDistance().ranking(found) == pytest.approx([-0.501, -0.104, -0.302])
    assert UntrainedDistance(combine="rank_sum").ranking(found) == [4.0, 4.0, 4.0]
    assert UntrainedDistance(combine="semantic").ranking(found) == [-0.5, -0.1, -0.3]
    assert UntrainedDistance(combine="relation").ranking(found) == [-0.001, -0.004, -0.002]


def test_networks_that_cannot_be_compared(batch: Batch) -> None:
    scorer = UntrainedDistance().seeded(0).open(build(1, 1), batch)
    with pytest.raises(ValueError, match="4 and 8 channels"):
        scorer(lambda seed: ResNet(num_classes=5, blocks=(1,), widths=(4,), stem_width=4))
