"""TAID: temporally adaptive interpolated distillation (Shing et al.; ICLR 2025).

Shing, Misaki, Bao, Yokoi, Akiba; arXiv 2501.16937. Distilling straight from a far larger teacher
averages modes (forward KL) or collapses onto one (reverse KL). TAID distils from a target that
moves from the student itself to the teacher:

    p_t = softmax((1 - t) stopgrad(z_s) + t z_t)              interpolated logits (..., C), fp32
    J   = -sum_c p_t log softmax(z_s)_c                       mean over positions that count
    L   = (1 - distil_ratio) * CE + distil_ratio * J

At t = 0 there is no gradient, at t = 1 it is that of forward KL. After each loss, from what it was
and what it was before:

    rel = (J' - J) / (J' + 1e-15),  m = beta m + (1 - beta) rel         J' the previous J
    t   = min(t_end, max(linear, t + alpha * sigmoid(m) * (1 - t)))
    linear = t_start + (t_end - t_start) n / N                          n of N optimiser steps

With alpha = 5e-4 the adaptive part matters only where N is about 10^4, as in the paper: alpha N is
the distance that t goes by itself, and in a run of some hundred steps the line would always win.
Without a value, alpha is therefore 5 / N, which is the paper's at its length. The share of steps in
which t lies above the line is recorded (``taid_adaptive``), with t and the line themselves.

Where paper and released code differ, the code is followed: J is a cross-entropy, though the paper
writes a KL divergence of the same gradient (``progress_signal`` chooses which of them drives t).
Unlike in the release, t stands still during validation, moves once an optimiser step where that
takes its batch in parts (there with each part), and ranks agree on it: J is the mean over the
positions of all. The weights of the paper's runs on images are not known; ``distil_ratio`` is the
option.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses import distributed
from kdrun.losses.chunked import mean_over_positions
from kdrun.losses.precision import full_precision
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import Fraction, NonNegative, ProperFraction

ALPHA_TIMES_STEPS = 5.0
"""The paper's alpha of 5e-4 over its 10^4 steps."""


@full_precision
def interpolated(student: Tensor, teacher: Tensor, t: Tensor) -> Tensor:
    """Logits of the target, ``(1 - t) student + t teacher``, both ``(..., C)``; no gradient.

    A class that one of both rules out (a logit of minus infinity) is ruled out by the target,
    unless that one has no share in it.
    """
    # Zero times infinity would be no number, nor would the difference of two infinities.
    lowest = torch.finfo(student.dtype).min / 4
    ours, theirs = (logits.detach().clamp(min=lowest) for logits in (student, teacher))
    return torch.lerp(ours, theirs, t.to(student.dtype))


@full_precision
def interpolated_cross_entropy(student: Tensor, teacher: Tensor, t: Tensor) -> Tensor:
    """Cross-entropy of the student under the interpolated target, and the entropy of the target.

    Their difference is the KL divergence that the paper writes. The gradient with respect to the
    student's logits is ``q - p_t`` at each position. A class that the student rules out (a logit of
    plus or minus infinity) adds nothing.

    Args:
        student: logits ``(..., C)``.
        teacher: logits ``(..., C)``.
        t: share of the teacher, a scalar.

    Returns:
        ``(..., 2)``: the two of each position, in nats; the second has no gradient.
    """
    log_p = F.log_softmax(interpolated(student, teacher, t), dim=-1)
    log_q = F.log_softmax(student, dim=-1).masked_fill(student.isinf(), 0)
    p = log_p.exp()
    cross_entropy = -(p * log_q).sum(dim=-1)
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(dim=-1)
    return torch.stack([cross_entropy, entropy], dim=-1)


class TAID(Method):
    """Distil from a target that moves from the student to the teacher, as fast as it is learned.

    Args:
        t_start: share of the teacher in the first target.
        t_end: share at the end.
        alpha: step of t where the loss is flat, per update; None: 5 over the number of steps.
        beta: momentum of the relative improvement.
        adaptive: whether t may run ahead of the line from t_start to t_end.
        distil_ratio: weight of the distillation term; the supervised loss has the rest.
        progress_signal: what t follows: the cross-entropy (as released) or the KL divergence.
    """

    tasks = ("classification", "language_modelling")
    detached = True
    lazy_logits = True

    def __init__(
        self,
        *,
        t_start: Fraction = 0.4,
        t_end: Fraction = 1.0,
        alpha: NonNegative | None = None,
        beta: ProperFraction = 0.99,
        adaptive: bool = True,
        distil_ratio: Fraction = 1.0,
        progress_signal: Literal["ce", "kl"] = "ce",
    ) -> None:
        super().__init__()
        if t_start > t_end:
            raise ValueError(f"TAID: t_start={t_start:g} lies beyond t_end={t_end:g}")
        self.t_start, self.t_end = t_start, t_end
        self.alpha, self.beta, self.adaptive = alpha, beta, adaptive
        self.distil_ratio = distil_ratio
        self.progress_signal = progress_signal
        # Saved with the checkpoint, so that a continued run goes on with the same t.
        self.register_buffer("t", torch.tensor(t_start, dtype=torch.float64))
        self.register_buffer("momentum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("previous", torch.tensor(torch.nan, dtype=torch.float64))
        self._of_step: list[tuple[Tensor, Tensor]] = []

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The distillation term and, unless its weight is 0, the supervised loss."""
        cross_entropy, target_entropy = mean_over_positions(
            partial(interpolated_cross_entropy, t=self.t.clone()),
            student.logits,
            teachers["teacher"].logits,
            mask=batch.mask,
        )
        line = self.line(progress)
        self.record("taid_t", self.t)
        self.record("taid_line", torch.full_like(self.t, line))
        self.record("taid_adaptive", (self.t > line + 1e-9).to(self.t))
        self.record("taid_kl", cross_entropy - target_entropy)
        if self.training:
            kl = cross_entropy - target_entropy
            signal = kl if self.progress_signal == "kl" else cross_entropy
            # A step may take its batch in parts; t moves once, after the last.
            count = len(batch) if batch.mask is None else batch.mask.sum()
            self._of_step.append((signal.detach(), signal.detach().new_ones(()) * count))
        terms = {"taid": cross_entropy}
        if self.distil_ratio < 1:
            terms["supervised"] = self.supervised_loss(student, batch)
        return terms

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        if self.distil_ratio == 1:
            return {}
        return {"taid": self.distil_ratio, "supervised": 1 - self.distil_ratio}

    def after_step(self, progress: Progress) -> None:
        """Move t by the mean loss over the positions of the step."""
        if self._of_step:
            losses, positions = (torch.stack(values) for values in zip(*self._of_step, strict=True))
            self._of_step = []
            sums = torch.stack([(losses * positions).sum(), positions.sum()]).to(self.t)
            total, count = distributed.sum_over_ranks(sums)
            self.advance(total / count, progress)

    def line(self, progress: Progress) -> float:
        """The floor of t: linear in the optimiser steps done."""
        return self.t_start + (self.t_end - self.t_start) * progress.fraction

    @torch.no_grad()
    def advance(self, loss: Tensor, progress: Progress) -> None:
        """Move t, once the loss under the present t is known.

        A loss that is not finite leaves the state as it is, and so does the first one, which has
        none to be compared with.

        Args:
            loss: J of the batch, over all ranks; a scalar.
            progress: ``step`` is n, ``steps`` is N.
        """
        loss = loss.detach().to(self.t)
        alpha = ALPHA_TIMES_STEPS / max(progress.steps, 1) if self.alpha is None else self.alpha
        known = loss.isfinite() & self.previous.isfinite()
        relative = torch.where(known, (self.previous - loss) / (self.previous + 1e-15), 0.0)
        momentum = torch.where(
            known, self.beta * self.momentum + (1 - self.beta) * relative, self.momentum
        )
        step = alpha * momentum.sigmoid() * (1 - self.t) if self.adaptive else 0.0
        moved = (self.t + step).clamp(min=self.line(progress), max=self.t_end)
        self.t.copy_(torch.where(known, moved, self.t))
        self.momentum.copy_(momentum)
        self.previous.copy_(torch.where(loss.isfinite(), loss, self.previous))
