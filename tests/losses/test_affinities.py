from __future__ import annotations

import pytest
import torch

from kdrun.losses.affinities import (
    channel_affinity_distance,
    class_map_distance,
    first_sample_channel_relation,
    gradient_affinity_distance,
)
from kdrun.losses.relations import similarity_relation


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_semantic_distance_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0, 2.0], [3.0, -4.0, 12.0]])
    teacher = torch.tensor([[2.0, 1.0, 2.0], [4.0, 3.0, 12.0]])
    assert gradient_affinity_distance(student, teacher).item() == pytest.approx(0.827087, abs=1e-6)
    cosine = [0.888889, 0.852071]
    expected = 2 - 2 * (cosine[0] * 1 + cosine[1] / 3) / 2
    assert expected == pytest.approx(0.827087, abs=1e-6)


def test_relation_distance_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert similarity_relation(student, teacher).item() == pytest.approx(0.199233, abs=1e-6)


def test_semantic_distance_is_the_closed_form_and_a_loop() -> None:
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    cosine = torch.cosine_similarity(student, teacher, dim=1)
    agreement = (student.sign() * teacher.sign()).mean(1)
    actual = gradient_affinity_distance(student, teacher)
    torch.testing.assert_close(actual, 2 - 2 * (cosine * agreement).mean())
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = torch.outer(ours, ours), torch.outer(theirs, theirs)
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        total += float((a - b).square().sum())
    assert actual.item() == pytest.approx(total / 24, rel=1e-5)


def test_semantic_distance_ignores_scale_and_sign_of_a_class() -> None:
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    distance = gradient_affinity_distance(student, teacher)
    torch.testing.assert_close(gradient_affinity_distance(7 * student, teacher), distance)
    flipped = student.clone()
    flipped[2] *= -1
    torch.testing.assert_close(gradient_affinity_distance(flipped, teacher), distance)
    assert gradient_affinity_distance(student, student) == 0
    # A class without gradient has no affinities, and no NaN.
    none = torch.zeros(6, 4)
    assert gradient_affinity_distance(none, none) == 0
    assert gradient_affinity_distance(none, teacher).item() == pytest.approx(1)


def test_ranges() -> None:
    for seed in range(20):
        student, teacher = draw(5, 8, seed=seed), draw(5, 8, seed=seed + 100)
        assert 0 <= gradient_affinity_distance(student, teacher) <= 4
        relation = similarity_relation(student, teacher)
        assert 0 <= relation <= 4 / 5
        assert similarity_relation(student.relu() + 0.01, teacher.relu() + 0.01) <= 2 / 5
        torch.testing.assert_close(similarity_relation(3 * student, teacher), relation)


def test_only_the_order_between_the_two_matters_to_relations() -> None:
    student, teacher, order = draw(5, 8), draw(5, 8, seed=1), torch.tensor([3, 0, 4, 1, 2])
    relation = similarity_relation(student, teacher)
    torch.testing.assert_close(similarity_relation(student[order], teacher[order]), relation)
    assert not torch.isclose(similarity_relation(student[order], teacher), relation)


def test_channel_affinities_equal_a_loop() -> None:
    student, teacher = draw(3, 4, 2, 2), draw(3, 4, 5, 5, seed=1)
    total = 0.0
    for ours, theirs in zip(student.flatten(2), teacher.flatten(2), strict=True):
        a, b = ours @ ours.T, theirs @ theirs.T
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        total += float((a - b).square().sum())
    actual = channel_affinity_distance(student, teacher).item()
    assert actual == pytest.approx(total / 12, rel=1e-5)


def test_class_maps_and_channels_of_the_first_sample() -> None:
    weight, maps = draw(6, 4), draw(3, 4, 2, 2).relu()
    assert class_map_distance(weight, maps, weight, maps) == 0
    # Another width and size of the maps is no hindrance.
    other = class_map_distance(weight, maps, draw(6, 7, seed=2), draw(3, 7, 3, 3, seed=3))
    assert 0 < other <= 2
    first = first_sample_channel_relation(maps, maps.flip(0))
    torch.testing.assert_close(first, similarity_relation(maps[0].flatten(1), maps[2].flatten(1)))


def test_gradients() -> None:
    student, teacher = draw(3, 4, 2, 2).double().requires_grad_(), draw(3, 4, 2, 2, seed=1).double()
    assert torch.autograd.gradcheck(lambda a: channel_affinity_distance(a, teacher), student)


@pytest.mark.parametrize("distance", [channel_affinity_distance, first_sample_channel_relation])
def test_other_widths_are_refused(distance) -> None:
    with pytest.raises(ValueError, match="4 and 8 channels"):
        distance(draw(3, 4, 2, 2), draw(3, 8, 2, 2))
    with pytest.raises(ValueError, match="4 and 8 channels"):
        gradient_affinity_distance(draw(5, 4), draw(5, 8))
