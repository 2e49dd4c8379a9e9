"""Learning-rate schedules against their closed forms, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from kdrun.errors import UserError
from kdrun.optimization import make_optimizer, make_scheduler

EPOCHS, STEPS, PEAK = 10, 7, 0.2
TOTAL = EPOCHS * STEPS


def rates(**changes: Any) -> list[float]:
    """The learning rate of every step of a training, and the one after its end."""
    node = {"name": "constant", "warmup_epochs": 0, "milestones": [], "gamma": 0.1, "min_lr": 0.0}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], PEAK)
    scheduler = make_scheduler(node | changes, optimizer, EPOCHS, STEPS)
    found = []
    for _ in range(TOTAL + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant() -> None:
    assert rates() == [PEAK] * (TOTAL + 1)


@pytest.mark.parametrize("warmup", [0, 2])
def test_multistep(warmup: int) -> None:
    found = rates(name="multistep", milestones=[4, 8.5], gamma=0.1, warmup_epochs=warmup)
    first, second = 4 * STEPS, round(8.5 * STEPS)
    for step in range(warmup * STEPS, TOTAL):
        factor = 1.0 if step < first else 0.1 if step < second else 0.01
        assert found[step] == pytest.approx(PEAK * factor), step


@pytest.mark.parametrize("warmup", [0, 1, 0.5])
@pytest.mark.parametrize("low", [0.0, 0.03])
def test_cosine(warmup: float, low: float) -> None:
    found = rates(name="cosine", min_lr=low, warmup_epochs=warmup)
    start = round(warmup * STEPS)
    for step in range(start, TOTAL + 1):
        share = (step - start) / (TOTAL - start)
        assert found[step] == pytest.approx(
            low + (PEAK - low) * (1 + math.cos(math.pi * share)) / 2, abs=1e-12
        )
    assert found[-1] == pytest.approx(low, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("low", [0.0, 0.05])
def test_linear(warmup: int, low: float) -> None:
    found = rates(name="linear", min_lr=low, warmup_epochs=warmup)
    start = warmup * STEPS
    for step in range(start, TOTAL + 1):
        share = (step - start) / (TOTAL - start)
        assert found[step] == pytest.approx(PEAK + (low - PEAK) * share, abs=1e-9)


@pytest.mark.parametrize("name", ["constant", "multistep", "cosine", "linear"])
def test_warm_up_starts_one_notch_above_zero(name: str) -> None:
    found = rates(name=name, milestones=[9], warmup_epochs=2)
    warmup = 2 * STEPS
    expected = [PEAK * (step + 1) / (warmup + 1) for step in range(warmup + 1)]
    assert found[: warmup + 1] == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 4])
def test_one_cycle(warmup: int) -> None:
    found = rates(name="onecycle", warmup_epochs=warmup)
    start, end = PEAK / 25, PEAK / 25 / 1e4
    peak_at = (warmup / EPOCHS if warmup else 0.3) * (TOTAL + 1) - 1

    def between(first: float, last: float, share: float) -> float:
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    for step, rate in enumerate(found):
        if step <= peak_at:
            expected = between(start, PEAK, step / peak_at)
        else:
            expected = between(PEAK, end, (step - peak_at) / (TOTAL - peak_at))
        assert rate == pytest.approx(expected), step
    assert max(found) == pytest.approx(PEAK, rel=1e-2)


def momenta(optimizer: torch.optim.Optimizer) -> list[float]:
    """The momentum of every step of a one-cycle training."""
    node = {"name": "onecycle", "warmup_epochs": 0, "milestones": [], "gamma": 0.1, "min_lr": 0.0}
    scheduler = make_scheduler(node, optimizer, EPOCHS, STEPS)
    found = []
    for _ in range(TOTAL):
        group = optimizer.param_groups[0]
        found.append(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("optimizer", "options", "lowest", "highest"),
    [
        ("SGD", {"momentum": 0.9}, 0.85, 0.95),  # what torch would do with any
        ("SGD", {"momentum": 0.5}, 0.45, 0.55),
        ("SGD", {"momentum": 0.02}, 0.01, 0.03),
        ("SGD", {"momentum": 0.98}, 0.97, 0.99),
        ("SGD", {}, 0.0, 0.0),
        ("RMSprop", {}, 0.0, 0.0),
        ("Adagrad", {}, 0.0, 0.0),
        ("AdamW", {}, 0.85, 0.95),
        ("AdamW", {"betas": (0.8, 0.98)}, 0.75, 0.85),
    ],
)
def test_one_cycle_moves_the_momentum_around_what_was_given(
    optimizer: str, options: dict[str, Any], lowest: float, highest: float
) -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    found = momenta(getattr(torch.optim, optimizer)(parameters, PEAK, **options))
    assert (found[0], max(found)) == (highest, highest)
    assert min(found) == pytest.approx(lowest, abs=1e-3)


def test_one_cycle_of_a_trial_that_is_shorter_than_its_warm_up() -> None:
    """``dry=true`` has one epoch, of one step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], PEAK)
    node = {"name": "onecycle", "warmup_epochs": 8, "milestones": [], "gamma": 0.1, "min_lr": 0.0}
    scheduler = make_scheduler(node, optimizer, epochs=1, steps_per_epoch=1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(PEAK)


def test_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'exponential'"):
        rates(name="exponential")


def test_optimisers_take_what_is_trained() -> None:
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    node = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.3}
    optimizer = make_optimizer(node, [*frozen.parameters(), *trained.parameters()])
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert group["params"] == list(trained.parameters())
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.3)


def test_options_that_do_not_fit_together_are_one_line() -> None:
    node = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.0, "nesterov": True}
    with pytest.raises(UserError, match=r"torch\.optim\.SGD: Nesterov momentum requires"):
        make_optimizer(node, nn.Linear(2, 2).parameters())
