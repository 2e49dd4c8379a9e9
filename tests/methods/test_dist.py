from __future__ import annotations

import numpy as np
import pytest
import torch

from kdrun.methods.dist import DIST, inter_and_intra
from kdrun.outputs import Progress
from tests.methods.training import agreement, train


def random_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 4, dtype=torch.float64, generator=generator).unbind()


def test_both_terms_are_mean_pearson_distances() -> None:
    student, teacher = random_logits()
    p, q = ((logits / 4).softmax(1).numpy() for logits in (student, teacher))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)]
    inter, intra = inter_and_intra(student, teacher, temperature=4.0)
    # The distance adds 1e-8 to norms of about 0.1.
    assert inter.item() == pytest.approx(1 - np.mean(rows), abs=1e-5)
    assert intra.item() == pytest.approx(1 - np.mean(columns), abs=1e-5)


def test_invariant_to_positive_affine_maps_of_probabilities() -> None:
    _, teacher = random_logits()
    # Probabilities mixed with the uniform ones: an affine map of each row and of each column.
    mixed = (0.3 * teacher.softmax(1) + 0.7 / 4).log()
    inter, intra = inter_and_intra(mixed, teacher, temperature=1.0)
    assert inter.item() == pytest.approx(0, abs=1e-5)
    assert intra.item() == pytest.approx(0, abs=1e-5)


def test_dense_logits_count_where_the_mask_says() -> None:
    student, teacher = random_logits()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    expected = inter_and_intra(student[mask.flatten()], teacher[mask.flatten()], temperature=2.0)
    actual = inter_and_intra(
        student.view(2, 3, 4), teacher.view(2, 3, 4), temperature=2.0, mask=mask
    )
    torch.testing.assert_close(actual, expected)


def test_what_does_not_count_has_neither_say_nor_gradient() -> None:
    student, teacher = random_logits()
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    student.requires_grad_()
    terms = inter_and_intra(student, teacher, temperature=2.0, mask=mask)
    sum(terms).backward()
    assert student.grad[~mask].abs().max() == 0 and student.grad[mask].abs().min() > 0
    assert torch.autograd.gradcheck(
        lambda s: inter_and_intra(s, teacher, temperature=2.0, mask=mask), student
    )
    student.grad = None
    nothing = inter_and_intra(student, teacher, temperature=2.0, mask=torch.zeros_like(mask))
    sum(nothing).backward()
    assert [term.item() for term in nothing] == [0, 0]
    assert student.grad.abs().max() == 0


def test_factors_hold_the_squared_temperature() -> None:
    weights = DIST(temperature=3.0, beta=2.0, gamma=1.0).weights(Progress(0, 1, 0, 1))
    assert weights == {"supervised": 1, "inter": 18, "intra": 9}


def test_training_correlates_with_the_teacher(data, teacher, student) -> None:
    history = train(DIST(temperature=1.0), student, teacher, data, epochs=3)
    assert history[-1]["inter"] < 0.3 * history[0]["inter"]
    assert history[-1]["intra"] < 0.3 * history[0]["intra"]
    assert agreement(student, teacher, data.inputs) > 0.9
