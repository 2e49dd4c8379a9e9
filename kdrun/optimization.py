"""Optimisers and learning-rate schedules of the ``training`` config group, all torch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from kdrun.build import instantiate


def make_optimizer(node: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimiser of ``training.optimizer`` over all given parameters that are trained."""
    return instantiate(dict(node), params=[p for p in parameters if p.requires_grad])


def make_scheduler(
    node: Mapping[str, Any], optimizer: Optimizer, epochs: int, steps_per_epoch: int
) -> LRScheduler:
    """The schedule of ``training.scheduler``, stepped once per optimiser step.

    Args:
        node: ``name`` (constant, linear, cosine, multistep, onecycle), ``warmup_epochs``,
            ``milestones`` and ``gamma`` (multistep; epochs), ``min_lr`` (linear, cosine).
        optimizer: its present learning rate is the peak; see ``_one_cycle`` for its momentum.
        epochs: length of training.
        steps_per_epoch: optimiser steps in an epoch.
    """
    steps = max(1, epochs * steps_per_epoch)
    warmup = round(node["warmup_epochs"] * steps_per_epoch)
    name = node["name"]
    peak = optimizer.param_groups[0]["lr"]
    rest = max(1, steps - warmup)
    if name == "onecycle":
        return _one_cycle(optimizer, peak, steps, warmup)
    main: LRScheduler
    if name == "multistep":
        milestones = [round(epoch * steps_per_epoch) - warmup for epoch in node["milestones"]]
        main = MultiStepLR(optimizer, milestones, gamma=node["gamma"])
    elif name == "cosine":
        main = CosineAnnealingLR(optimizer, rest, eta_min=node["min_lr"])
    elif name == "linear":
        main = LinearLR(optimizer, 1.0, max(node["min_lr"] / peak, 1e-12), rest)
    elif name == "constant":
        main = ConstantLR(optimizer, 1.0, 1)
    else:
        raise ValueError(f"unknown schedule {name!r}")
    if not warmup:
        return main
    # Step 0 already moves: the ramp starts one notch above zero.
    ramp = LinearLR(optimizer, 1.0 / (warmup + 1), 1.0, warmup)
    return SequentialLR(optimizer, [ramp, main], [warmup])


def _one_cycle(optimizer: Optimizer, peak: float, steps: int, warmup: int) -> LRScheduler:
    """Smith's one cycle: the rate rises and falls, momentum (Adam's first beta) falls and rises.

    torch moves momentum between 0.95 and 0.85, whatever the optimiser was given. Here it moves by
    0.05 to either side of what was given, less near 0 and 1: the same at 0.9, and none stays none.
    """
    # The cycle brings its own warm-up; a trial of one epoch may be shorter than that.
    rise = min(warmup / steps, 1.0) if warmup else 0.3
    group = optimizer.param_groups[0]
    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
    around = min(0.05, momentum / 2, (1.0 - momentum) / 2)
    return OneCycleLR(
        optimizer,
        max_lr=peak,
        total_steps=steps + 1,
        pct_start=rise,
        cycle_momentum=momentum > 0,
        # Rounded, since 0.9 + 0.05 is not 0.95 in binary.
        base_momentum=round(momentum - around, 9),
        max_momentum=round(momentum + around, 9),
    )
