from __future__ import annotations

import pytest
import torch

from kdrun.losses.edges import difference_divergence, neighbour_divergence
from kdrun.methods.ff_g2m import FFG2M, TERMS
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.tasks.classification import Classification

NOW = Progress(0, 1, 0, 1)
EDGES = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
TEACHER = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
STUDENT = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])


def terms_of(method: FFG2M) -> dict[str, torch.Tensor]:
    """A path of three nodes, of which the first has a label."""
    method.supervised_loss = Classification(num_classes=2).supervised_loss
    batch = Batch(
        {"x": torch.zeros(3, 1), "edge_index": EDGES},
        torch.tensor([0, -100, -100]),
        torch.arange(3),
        torch.tensor([True, False, False]),
    )
    return method.losses(ModelOutput(STUDENT), {"teacher": ModelOutput(TEACHER)}, batch, NOW)


def total(method: FFG2M) -> float:
    weights = method.weights(NOW)
    return float(sum(weights[name] * term for name, term in terms_of(method).items()))


def test_the_objective_by_hand() -> None:
    terms = terms_of(FFG2M())
    assert terms["supervised"].item() == pytest.approx(0.313262, abs=1e-6)
    assert terms["low_frequency"].item() == pytest.approx(0.234301, abs=1e-6)
    assert terms["high_frequency"].item() == pytest.approx(0.020668, abs=1e-6)
    assert total(FFG2M()) == pytest.approx(0.278286, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mlp", 0.313262),
        ("glnn", 0.4 * 0.313262 + 0.6 * 0.115966),
        ("lfd", 0.4 * 0.313262 + 0.6 * 0.234301),
        ("hfd", 0.4 * 0.313262 + 0.6 * 0.020668),
    ],
)
def test_the_modes_by_hand(mode: str, expected: float) -> None:
    assert set(terms_of(FFG2M(mode=mode))) == {"supervised", *TERMS[mode]}
    assert total(FFG2M(mode=mode)) == pytest.approx(expected, abs=1e-6)


def test_labels_may_be_left_out() -> None:
    assert FFG2M(label_weight=0.0).weights(NOW) == {
        "supervised": 0.0,
        "low_frequency": 1.0,
        "high_frequency": 1.0,
    }


def test_both_divergences_are_recorded_in_every_mode() -> None:
    method = FFG2M(mode="glnn")
    terms_of(method)
    recorded = method.take_recorded()
    assert recorded["low_frequency"] == neighbour_divergence(STUDENT, TEACHER, EDGES)
    expected = difference_divergence(STUDENT, TEACHER, EDGES, temperature=1.5)
    assert recorded["high_frequency"] == expected


# -- training --------------------------------------------------------------------------------------


def two_rings(count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy features of the nodes of two rings, their edges, and logits that follow the rings."""
    generator = torch.Generator().manual_seed(0)
    ring = torch.arange(2 * count) // count
    following = torch.arange(2 * count).view(2, count).roll(1, dims=1).flatten()
    there = torch.stack([torch.arange(2 * count), following])
    features = torch.randn(2 * count, 8, generator=generator)
    features[:, 0] += 3.0 * ring
    place = torch.arange(2 * count) % count * (2 * torch.pi / count)
    logits = torch.stack([2.0 - 2.0 * ring, 2.0 * ring, place.sin()], dim=1)
    return features, torch.cat([there, there.flip(0)], dim=1), logits


@pytest.mark.parametrize("mode", ["full", "lfd", "glnn"])
def test_training_brings_a_perceptron_to_the_teacher(mode: str) -> None:
    features, edges, logits = two_rings()
    target = logits.argmax(1)
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    method = FFG2M(mode=mode, label_weight=0.1)
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    batch = Batch({"x": features, "edge_index": edges}, target, torch.arange(len(target)))
    recorded = []
    for _ in range(100):
        terms = method.losses(
            ModelOutput(student(features)), {"teacher": ModelOutput(logits)}, batch, NOW
        )
        weights = method.weights(NOW)
        optimizer.zero_grad()
        sum(weights[name] * term for name, term in terms.items()).backward()
        optimizer.step()
        recorded.append(method.take_recorded())
    assert recorded[-1]["low_frequency"] < 0.3 * recorded[0]["low_frequency"]
    assert (student(features).argmax(1) == target).float().mean() > 0.95
    if mode == "full":
        assert recorded[-1]["high_frequency"] < 0.8 * recorded[0]["high_frequency"]
