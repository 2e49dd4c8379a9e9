from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses import distributions
from kdrun.losses.chunked import mean_over_positions
from kdrun.methods.taid import interpolated_cross_entropy
from kdrun.outputs import HeadLogits

POSITIONS, CLASSES = 13, 7


def divergence(function, student: Tensor, teacher: Tensor) -> Tensor:
    return function(student.log_softmax(-1), teacher.log_softmax(-1)).unsqueeze(-1)


LOSSES = {
    "forward_kl": partial(divergence, distributions.forward_kl),
    "adaptive_kl": partial(divergence, partial(distributions.adaptive_kl, head_mass=0.5)),
    "taid": partial(interpolated_cross_entropy, t=torch.tensor(0.4)),
}


def network(seed: int, width: int, bias: bool, dtype=torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (1, POSITIONS, width), "weight": (CLASSES, width)}
    shapes |= {"bias": (CLASSES,)} if bias else {}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def head(tensors: dict[str, Tensor], chunk: int) -> HeadLogits:
    return HeadLogits(tensors["hidden"], tensors["weight"], tensors.get("bias"), chunk)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_do_not_depend_on_the_chunk(name, chunk, masked, bias) -> None:
    per_position = LOSSES[name]
    student, teacher = network(0, 4, bias), network(1, 6, bias=False)
    leaves = [value.requires_grad_() for value in student.values()]
    mask = torch.arange(POSITIONS).remainder(3).bool().unsqueeze(0) if masked else None
    ours, theirs = head(student, chunk), head(teacher, chunk)
    whole = mean_over_positions(per_position, ours.dense(), theirs.dense(), mask=mask)
    expected = torch.autograd.grad(3 * whole[0], leaves)
    pieces = mean_over_positions(per_position, ours, theirs, mask=mask)
    torch.testing.assert_close(pieces, whole)
    assert not any(value.requires_grad for value in teacher.values())
    for found, wanted in zip(torch.autograd.grad(3 * pieces[0], leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_only_the_first_value_is_differentiated() -> None:
    student = network(0, 4, False)
    student["hidden"].requires_grad_()
    values = mean_over_positions(LOSSES["taid"], head(student, 5), head(network(1, 6, False), 5))
    (gradient,) = torch.autograd.grad(values[1], student["hidden"], allow_unused=True)
    assert gradient.abs().max() == 0


def test_nothing_counts_nothing_is_lost() -> None:
    student = network(0, 4, False)
    student["hidden"].requires_grad_()
    mask = torch.zeros(1, POSITIONS, dtype=torch.bool)
    value = mean_over_positions(
        LOSSES["forward_kl"], head(student, 5), head(network(1, 6, False), 5), mask=mask
    )
    value.sum().backward()
    assert value.item() == 0 and student["hidden"].grad.abs().max() == 0


def test_half_precision_inputs_give_a_loss_in_full_precision() -> None:
    student = network(0, 4, False, torch.bfloat16)
    student["hidden"].requires_grad_()
    student["weight"] = student["weight"].float().requires_grad_()
    teacher = network(1, 6, False, torch.bfloat16)
    (value,) = mean_over_positions(LOSSES["forward_kl"], head(student, 5), head(teacher, 5))
    value.backward()
    logits = F.linear(student["hidden"].float(), student["weight"])
    theirs = F.linear(teacher["hidden"].float(), teacher["weight"].float())
    (expected,) = mean_over_positions(LOSSES["forward_kl"], logits, theirs)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=0.05)
    assert student["hidden"].grad.dtype == torch.bfloat16
    assert student["weight"].grad.dtype == torch.float32
