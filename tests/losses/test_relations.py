from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from kdrun.losses.relations import (
    angle_relation,
    angles,
    distance_relation,
    neighbour_congruence,
    pearson_distance,
    probabilistic_relation,
    relative_distances,
    similarity_relation,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_collinear_points_of_equal_proportions_have_equal_distances() -> None:
    student = torch.tensor([[0.0], [1.0], [3.0]])
    teacher = torch.tensor([[0.0], [2.0], [6.0]])
    assert distance_relation(student, teacher).item() == pytest.approx(0, abs=1e-12)
    # Distances 1, 3, 2 over their mean 2.
    expected = torch.tensor([[0.0, 0.5, 1.5], [0.5, 0.0, 1.0], [1.5, 1.0, 0.0]])
    torch.testing.assert_close(relative_distances(student), expected)


def test_angles_are_the_naive_loop() -> None:
    features = random(4, 3)
    expected = torch.zeros(4, 4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            for k in range(4):
                if i not in (j, k):
                    expected[i, j, k] = F.cosine_similarity(
                        features[j] - features[i], features[k] - features[i], dim=0
                    )
    torch.testing.assert_close(angles(features), expected)


def test_relations_are_the_mean_smooth_l1_over_all_entries() -> None:
    student, teacher = random(4, 3), random(4, 5, seed=1)
    for relation, loss in [(relative_distances, distance_relation), (angles, angle_relation)]:
        difference = (relation(student) - relation(teacher)).abs()
        smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5)
        torch.testing.assert_close(loss(student, teacher), smooth.mean())


@pytest.mark.parametrize("relation", [distance_relation, angle_relation])
def test_invariant_to_scale_rotation_and_translation(relation) -> None:
    features = random(5, 2)
    turn = torch.tensor(
        [[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]], dtype=torch.float64
    )
    moved = 3 * features @ turn + torch.tensor([5.0, -2.0], dtype=torch.float64)
    assert relation(moved, features).item() == pytest.approx(0, abs=1e-12)
    assert relation(random(5, 2, seed=2), features) > 1e-3


@pytest.mark.parametrize("relation", [distance_relation, angle_relation])
def test_duplicates_leave_the_gradient_finite(relation) -> None:
    student = random(4, 3)
    student[1] = student[0]
    student.requires_grad_()
    relation(student, random(4, 3, seed=1)).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1, "equal samples are not torn apart"


def test_duplicates_are_a_hair_apart() -> None:
    features = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    # Six distances: two of 1e-6, four of 5.
    expected = torch.tensor([[0, 1e-6, 5], [1e-6, 0, 5], [5, 5, 0]]) / (20 / 6)
    torch.testing.assert_close(relative_distances(features), expected)


@pytest.mark.parametrize("relation", [distance_relation, angle_relation])
def test_gradients_by_finite_differences(relation) -> None:
    student, teacher = random(3, 4).requires_grad_(), random(3, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: relation(s, teacher), student)


def test_similarity_is_the_naive_loop() -> None:
    student, teacher = random(4, 2, 3, 3), random(4, 5, seed=1)
    matrices = []
    for features in (student, teacher):
        rows = torch.stack([torch.stack([(a * b).sum() for b in features]) for a in features])
        matrices.append(torch.stack([row / row.norm() for row in rows]))
    expected = ((matrices[0] - matrices[1]) ** 2).sum() / 16
    torch.testing.assert_close(similarity_relation(student, teacher), expected)


def test_probabilities_of_orthogonal_and_identical_vectors_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # P_t = (2/3, 1/3; 1/3, 2/3), P_s = 1/2 everywhere.
    expected = (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)) / 2
    assert expected == pytest.approx(0.02832, abs=1e-5)
    assert probabilistic_relation(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("relation", [similarity_relation, probabilistic_relation])
def test_similarities_are_invariant_to_scale(relation) -> None:
    student, teacher = random(5, 3), random(5, 4, seed=1)
    torch.testing.assert_close(
        relation(3 * student, teacher / 2), relation(student, teacher), rtol=1e-5, atol=0
    )
    assert relation(student, student).item() == pytest.approx(0, abs=1e-12)


def test_congruence_is_over_neighbours() -> None:
    student, teacher = random(4, 3), random(4, 3, seed=1)
    d = (student - teacher).abs()
    expected = sum((d[i] * d[i + 1]).sum() for i in range(3)) / 3
    torch.testing.assert_close(neighbour_congruence(student, teacher), expected)


@pytest.mark.parametrize(
    "relation",
    [
        distance_relation,
        angle_relation,
        similarity_relation,
        probabilistic_relation,
        neighbour_congruence,
    ],
)
def test_a_single_sample_is_finite(relation) -> None:
    student = random(1, 3).requires_grad_()
    loss = relation(student, random(1, 3, seed=1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("relation", [similarity_relation, probabilistic_relation])
def test_similarity_gradients_by_finite_differences(relation) -> None:
    student, teacher = random(3, 4).requires_grad_(), random(3, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: relation(s, teacher), student)


def test_pearson_distance_of_constants_is_one() -> None:
    constant = torch.ones(2, 3, requires_grad=True)
    distance = pearson_distance(constant, random(2, 3).float(), dim=1)
    distance.sum().backward()
    assert distance.tolist() == [1, 1]
    assert torch.isfinite(constant.grad).all()
