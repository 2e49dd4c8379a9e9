"""Losses and logit methods on extreme inputs: finite, with finite gradients, where mathematics is.

Every input is a pair of a student's and a teacher's tensor: large, tiny, equal, constant, one
sample, few classes, in every floating-point type. ``test_how_many`` states their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kdrun.build import instantiate
from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.losses import divergence, feature_maps, optimal_transport, relations
from kdrun.losses.contrastive import noise_contrastive_estimation
from kdrun.outputs import Batch, ModelOutput, Progress

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 2), (3, 10), (16, 100))
TEMPERATURES = (1.0, 20.0)
KINDS = ("normal", "large", "huge", "tiny", "zero", "equal rows", "constant rows", "one-hot")


def fill(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {
        "normal": lambda: values,
        "large": lambda: values * 100,
        "huge": lambda: values.sign() * 1e4,
        "tiny": lambda: values * 1e-6,
        "zero": lambda: values * 0,
        "equal rows": lambda: values[:1].expand(shape).clone(),
        "constant rows": lambda: (
            values.flatten(1)[:, :1].reshape(-1, *[1] * (len(shape) - 1)) + 0 * values
        ),
        "one-hot": lambda: (
            1e4 * torch.nn.functional.one_hot(values.argmax(1), shape[1]).float()
            if len(shape) == 2
            else values.clamp(min=0) * 1e3
        ),
    }[kind]()


def pairs(shapes: tuple[tuple[int, ...], ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for dtype, shape, ours, theirs in itertools.product(DTYPES, shapes, KINDS, KINDS):
        student = fill(ours, shape, 1).to(dtype).requires_grad_()
        teacher = fill(theirs, shape, 1 if ours == theirs else 2).to(dtype)
        yield f"{dtype} {shape} {ours}/{theirs}", student, teacher


def trouble(name: str, losses: Tensor, *inputs: Tensor) -> str:
    """What is wrong with a loss or its gradient.

    A gradient of half precision may be too large for that type, but must be a number.
    """
    if not losses.isfinite().all():
        return f"{name}: {losses.tolist()}"
    gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    present = [g for g in gradients if g is not None]
    bad = [g for g in present if g.isnan().any() or (g.dtype != torch.float16 and g.isinf().any())]
    return f"{name}: its gradient" if bad else ""


def labels(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) % logits.shape[1]


def at_each_temperature(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def losses(student: Tensor, teacher: Tensor) -> Tensor:
        return torch.stack([loss(student, teacher, temperature=t) for t in TEMPERATURES])

    return losses


LOGIT_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": at_each_temperature(
        lambda s, t, temperature: divergence.kl_divergence(
            s, t, temperature=temperature, t_squared=True
        )
    ),
    "standardized kl": at_each_temperature(
        lambda s, t, temperature: divergence.kl_divergence(
            divergence.standardize(s),
            divergence.standardize(t),
            temperature=temperature,
            t_squared=True,
        )
    ),
    "soft cross-entropy": at_each_temperature(
        lambda s, t, temperature: divergence.soft_cross_entropy(
            s, t, temperature=temperature, t_squared=True
        )
    ),
    "decoupled": at_each_temperature(
        lambda s, t, temperature: torch.stack(
            divergence.decoupled_divergence(
                s, t, labels(s), temperature=temperature, t_squared=True
            )
        )
    ),
    "pearson over samples": lambda s, t: relations.pearson_distance(s, t, dim=0).mean(),
    "pearson over classes": lambda s, t: relations.pearson_distance(s, t, dim=1).mean(),
    "transport": lambda s, t: (
        optimal_transport.sinkhorn_plan(
            optimal_transport.pairwise_l1(s, t), epsilon=0.1, iterations=10
        )
    ).sum(),
}

FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "distances": relations.distance_relation,
    "angles": relations.angle_relation,
    "similarity": relations.similarity_relation,
    "probabilistic": relations.probabilistic_relation,
    "neighbours": relations.neighbour_congruence,
    "squared error": feature_maps.mean_squared_error,
}

MAP_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": feature_maps.attention_distance,
    "selectivity": feature_maps.selectivity_discrepancy,
    "context": feature_maps.hierarchical_context_loss,
    "squared error": feature_maps.mean_squared_error,
    "likelihood": lambda s, t: feature_maps.gaussian_negative_log_likelihood(
        s, t, torch.full((s.shape[1], 1, 1), 1e-2)
    ),
    "margin": lambda s, t: feature_maps.partial_squared_error(
        s, t, torch.full((s.shape[1],), -0.1).view(-1, 1, 1)
    ),
}
MAPS = ((1, 2, 1, 1), (2, 3, 4, 4), (8, 4, 2, 2))


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_losses_of_logits(name: str) -> None:
    loss = LOGIT_LOSSES[name]
    found = [trouble(case, loss(s, t), s) for case, s, t in pairs(SHAPES)]
    assert not any(found), [case for case in found if case][:5]


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_losses_of_features(name: str) -> None:
    loss = FEATURE_LOSSES[name]
    # Distances of 1e4 have squares beyond half precision's range, not beyond that of the sums.
    found = [trouble(case, loss(s, t), s) for case, s, t in pairs(SHAPES)]
    assert not any(found), [case for case in found if case][:5]


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_losses_of_feature_maps(name: str) -> None:
    loss = MAP_LOSSES[name]
    found = [trouble(case, loss(s, t), s) for case, s, t in pairs(MAPS)]
    assert not any(found), [case for case in found if case][:5]


def test_noise_contrastive_estimation() -> None:
    for scale, count in itertools.product((0.0, 1e-30, 1.0, 1e30), (1, 8)):
        positive = torch.full((4,), scale or 1e-12, requires_grad=True)
        negative = torch.full((4, count), scale, requires_grad=True)
        loss = noise_contrastive_estimation(positive, negative, samples=50_000)
        assert not trouble(f"{scale} {count}", loss, positive, negative)


LOGIT_METHODS = ("kd", "dkd", "dist", "ls", "mlld", "sinkhorn")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_logit_methods(name: str) -> None:
    values = compose([f"method={name}"], open_catalogue()).values
    method = instantiate(values["method"])
    task = instantiate(values["task"], num_classes=100, label_smoothing=0.0)
    method.supervised_loss = task.supervised_loss
    example = ModelOutput(torch.zeros(3, 10))
    method.setup(example, {"teacher": example})
    found = []
    for case, student, teacher in pairs(SHAPES):
        batch = Batch(torch.zeros(len(student), 1), labels(student), torch.arange(len(student)))
        ours = ModelOutput(student, views={"strong": ModelOutput(student)})
        theirs = ModelOutput(teacher, views={"strong": ModelOutput(teacher)})
        terms = method.losses(ours, {"teacher": theirs}, batch, Progress(1, 3, 2, 6))
        found.append(trouble(case, torch.stack([t.float() for t in terms.values()]), student))
    assert not any(found), [case for case in found if case][:5]


def test_one_class() -> None:
    """A distribution over one class is certain: divergences are zero, not undefined."""
    for dtype, value in itertools.product(DTYPES, (-1e4, 0.0, 1e4)):
        student = torch.full((3, 1), value, dtype=dtype, requires_grad=True)
        teacher = torch.zeros(3, 1, dtype=dtype)
        for function in (divergence.kl_divergence, divergence.soft_cross_entropy):
            loss = function(student, teacher, temperature=4.0, t_squared=True)
            assert loss == 0 and not trouble("one class", loss, student)


def test_how_many() -> None:
    logits, maps = (sum(1 for _ in pairs(shapes)) for shapes in (SHAPES, MAPS))
    temperatures = 4 * len(TEMPERATURES) + 3
    methods = len(LOGIT_METHODS) * logits
    total = logits * (temperatures + len(FEATURE_LOSSES)) + maps * len(MAP_LOSSES) + methods
    assert total + 8 + 18 == 16730
