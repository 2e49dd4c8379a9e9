from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdrun.losses.divergence import kl_divergence
from kdrun.losses.edges import (
    difference_divergence,
    frequency_parts,
    neighbour_divergence,
    neighbour_similarity,
)

PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
TEACHER = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
STUDENT = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
NO_EDGES = torch.empty(2, 0, dtype=torch.long)


@pytest.fixture
def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of twelve nodes in five classes, and thirty undirected edges."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 12, 5, generator=generator)
    ends = torch.randint(12, (2, 40), generator=generator)
    ends = ends[:, ends[0] != ends[1]][:, :30]
    return student, teacher, torch.cat([ends, ends.flip(0)], dim=1)


def divergence(teacher: Tensor, student: Tensor) -> float:
    p, q = teacher.softmax(0), student.softmax(0)
    return float((p * (p / q).log()).sum())


def test_neighbours_by_hand() -> None:
    assert neighbour_divergence(STUDENT, TEACHER, PATH).item() == pytest.approx(0.234301, abs=1e-6)
    differences = difference_divergence(STUDENT, TEACHER, PATH, temperature=1.5)
    assert differences.item() == pytest.approx(0.020668, abs=1e-6)


def test_one_edge_by_hand() -> None:
    """Across edge 0-1 the logits differ and the differences do not; across 1-2 both do."""
    first, second = PATH[:, :2], PATH[:, 2:]
    assert difference_divergence(STUDENT, TEACHER, first, temperature=1.5) == 0
    p, q = (0.208609, 0.791391), (0.339244, 0.660756)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    actual = difference_divergence(STUDENT, TEACHER, second, temperature=1.5).item()
    assert actual == pytest.approx(expected, abs=1e-6)


def test_both_equal_a_loop_over_edges(graph) -> None:
    student, teacher, edges = graph
    low = [divergence(teacher[j], student[i]) for i, j in edges.T]
    low += [divergence(teacher[i], student[i]) for i in range(12)]
    actual = neighbour_divergence(student, teacher, edges).item()
    assert actual == pytest.approx(sum(low) / len(low), rel=1e-5)
    high = [
        divergence((teacher[i] - teacher[j]).abs() / 1.3, (student[i] - student[j]).abs() / 1.3)
        for i, j in edges.T
    ]
    actual = difference_divergence(student, teacher, edges, temperature=1.3).item()
    assert actual == pytest.approx(sum(high) / len(high), rel=1e-5)


def test_a_student_equal_to_the_teacher(graph) -> None:
    _, teacher, edges = graph
    assert difference_divergence(teacher, teacher, edges, temperature=2.0) == 0
    assert neighbour_divergence(teacher, teacher, edges) > 0.1
    alike = teacher[:1].expand(12, -1)
    assert neighbour_divergence(alike, alike, edges).item() == pytest.approx(0, abs=1e-6)


def test_a_graph_without_edges(graph) -> None:
    student, teacher, _ = graph
    torch.testing.assert_close(
        neighbour_divergence(student, teacher, NO_EDGES),
        kl_divergence(student, teacher, t_squared=False),
    )
    student.requires_grad_()
    nothing = difference_divergence(student, teacher, NO_EDGES, temperature=1.5)
    assert nothing == 0
    nothing.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_edges_of_a_node_to_itself_change_nothing(graph) -> None:
    student, teacher, edges = graph
    loops = torch.cat([edges, torch.arange(12).expand(2, -1)], dim=1)
    both = [neighbour_divergence(student, teacher, each) for each in (edges, loops)]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(
        *(difference_divergence(student, teacher, e, temperature=1.5) for e in (edges, loops))
    )
    torch.testing.assert_close(*(neighbour_similarity(student, e) for e in (edges, loops)))


def test_invariances(graph) -> None:
    student, teacher, edges = graph
    generator = torch.Generator().manual_seed(1)
    of_each_node = torch.randn(12, 1, generator=generator)
    low = neighbour_divergence(student, teacher, edges)
    torch.testing.assert_close(neighbour_divergence(student + of_each_node, teacher, edges), low)
    torch.testing.assert_close(neighbour_divergence(student, teacher, edges.flip(0)), low)
    of_each_class = torch.randn(1, 5, generator=generator)
    high = difference_divergence(student, teacher, edges, temperature=1.5)
    for other in (
        difference_divergence(student + of_each_class, teacher, edges, temperature=1.5),
        difference_divergence(student, teacher, edges.flip(0), temperature=1.5),
    ):
        torch.testing.assert_close(other, high)
    assert low != neighbour_divergence(teacher, student, edges), "the direction matters"


def test_gradients(graph) -> None:
    student, teacher, edges = (t.double() if t.is_floating_point() else t for t in graph)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: neighbour_divergence(z, teacher, edges), student, fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda z: difference_divergence(z, teacher, edges, temperature=1.5), student, fast_mode=True
    )


def test_frequencies(graph) -> None:
    student, _, edges = graph
    low, high = frequency_parts(student, edges)
    torch.testing.assert_close(low + high, student)
    adjacency = torch.zeros(12, 12)
    for i, j in edges.T.tolist():
        adjacency[i, j] += 1
    degree = adjacency.sum(1).clamp(min=1)
    smooth = adjacency / (degree[:, None] * degree[None, :]).sqrt() @ student
    torch.testing.assert_close(low, (student + smooth) / 2)
    # The square root of the degrees is the smoothest signal there is.
    constant = adjacency.sum(1).sqrt()[:, None]
    assert frequency_parts(constant, edges)[1].abs().max() < 1e-6


def test_similarity_of_neighbours() -> None:
    values = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    assert neighbour_similarity(values, PATH).item() == pytest.approx(math.sqrt(0.5))
    assert neighbour_similarity(values, NO_EDGES) == 0
