"""Divergences between two distributions over classes, one value per position.

Every function takes log-probabilities of student and teacher ``(..., C)`` (``log_q`` and ``log_p``)
and gives ``(...)``, in nats. They are the objectives that tables of language-model distillation
compare; means over positions, masks and temperatures are their caller's. Probabilities of exactly
zero (log-probabilities of minus infinity, as of banned tokens) contribute nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Log-probabilities of student and teacher ``(..., C)`` to one value per position ``(...)``."""


@dataclass(frozen=True, slots=True)
class Options:
    """The numbers that some divergences have; see the functions for what they mean."""

    beta: float = 0.5
    skew: float = 0.1
    share: float = 0.9
    head_mass: float = 0.5
    alpha: float = 0.2
    alpha_beta: float = 0.7


def chosen(name: str, options: Options) -> Divergence:
    """The divergence of a name, with its numbers.

    Raises:
        KeyError: there is none of that name.
    """
    return {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "symmetric_kl": partial(symmetric_kl, share=options.share),
        "jsd": partial(jensen_shannon, beta=options.beta),
        "tvd": total_variation,
        "skew_forward_kl": partial(skew_forward_kl, skew=options.skew),
        "skew_reverse_kl": partial(skew_reverse_kl, skew=options.skew),
        "adaptive_kl": partial(adaptive_kl, head_mass=options.head_mass),
        "alpha_beta": partial(alpha_beta, alpha=options.alpha, beta=options.alpha_beta),
    }[name]


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(p || q) = sum_c p (log p - log q)``: the student must cover what the teacher says."""
    return _weighted(log_p.exp(), log_p - log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q || p)``: the student is punished for what the teacher would not say (Gu et al., 2024,
    MiniLLM)."""
    return forward_kl(log_p, log_q)


def symmetric_kl(log_q: Tensor, log_p: Tensor, *, share: float) -> Tensor:
    """``(1 - share) KL(p || q) + share KL(q || p)``."""
    return (1 - share) * forward_kl(log_q, log_p) + share * reverse_kl(log_q, log_p)


def jensen_shannon(log_q: Tensor, log_p: Tensor, *, beta: float) -> Tensor:
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``.

    Agarwal et al., ICLR 2024 (GKD), equation 1, with beta the weight of the teacher; some code
    gives it to the student, which is the same at 0.5. At 0 and 1 the formula vanishes; there it
    stands for forward and reverse KL, as in TRL.
    """
    if beta == 0:
        return forward_kl(log_q, log_p)
    if beta == 1:
        return reverse_kl(log_q, log_p)
    log_m = _mixture(log_p, log_q, beta)
    return beta * forward_kl(log_m, log_p) + (1 - beta) * forward_kl(log_m, log_q)


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``1/2 sum_c |p - q|``, within [0, 1] (Wen et al., ACL 2023)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def skew_forward_kl(log_q: Tensor, log_p: Tensor, *, skew: float) -> Tensor:
    """``KL(p || skew p + (1 - skew) q)`` (Ko et al., ICML 2024, DistiLLM, equation 3)."""
    return forward_kl(_mixture(log_p, log_q, skew), log_p)


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, *, skew: float) -> Tensor:
    """``KL(q || (1 - skew) p + skew q)`` (Ko et al., ICML 2024, DistiLLM)."""
    return forward_kl(_mixture(log_q, log_p, skew), log_q)


def adaptive_kl(log_q: Tensor, log_p: Tensor, *, head_mass: float) -> Tensor:
    """``w KL(p || q) + (1 - w) KL(q || p)``, w the share of ``|p - q|`` in the teacher's head.

    Wu et al., COLING 2025 (AKL). The head of a position are the teacher's most probable classes
    whose cumulative probability is at most ``head_mass``, and always the first. Weights carry no
    gradient. Where both agree there is nothing to share out, and the value is 0. Other code counts
    the class that straddles ``head_mass`` as head, or forgets to undo the sort.
    """
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        sorted_p, order = p.sort(dim=-1, descending=True)
        head = sorted_p.cumsum(dim=-1) <= head_mass
        head[..., 0] = True
        gap = (p - q).abs().gather(-1, order)
        of_head, total = (gap * head).sum(dim=-1), gap.sum(dim=-1)
        weight = torch.where(total > 0, of_head / total.clamp(min=1e-30), 0.5)
    return weight * forward_kl(log_q, log_p) + (1 - weight) * reverse_kl(log_q, log_p)


def alpha_beta(log_q: Tensor, log_p: Tensor, *, alpha: float, beta: float) -> Tensor:
    """The alpha-beta divergence, which holds forward KL at (1, 0) and reverse KL at (0, 1).

    Wang et al., ICML 2025 (ABKD): ``-1 / (a b) sum_c [p^a q^b - a / (a + b) p^(a + b) - b / (a + b)
    q^(a + b)]``, and its limits where a, b or their sum is 0. Where one of them is 0 the released
    code divides by the other once, not twice, and so is no limit unless that is 1.
    """
    a, b = alpha, beta
    if a == 0 and b == 0:
        return 0.5 * (log_q - log_p).square().sum(dim=-1)
    if b == 0:
        p_a, q_a = (a * log_p).exp(), (a * log_q).exp()
        return (_product(p_a, a * (log_p - log_q)) - p_a + q_a).sum(dim=-1) / a**2
    if a == 0:
        return alpha_beta(log_p, log_q, alpha=b, beta=0.0)
    if a + b == 0:
        difference = a * (log_q - log_p)
        return (difference + (-difference).exp() - 1).sum(dim=-1) / a**2
    mixed = (a * log_p + b * log_q).exp()
    ours, theirs = ((a + b) * log_q).exp(), ((a + b) * log_p).exp()
    return -(mixed - (a * theirs + b * ours) / (a + b)).sum(dim=-1) / (a * b)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Logarithm of ``share`` of the first distribution and the rest of the second."""
    if share == 0:
        return second
    if share == 1:
        return first
    # Two infinities have a sum without a gradient.
    lowest = torch.finfo(first.dtype).min / 2
    first, second = first.clamp(min=lowest), second.clamp(min=lowest)
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _weighted(probability: Tensor, values: Tensor) -> Tensor:
    return _product(probability, values).sum(dim=-1)


def _product(probability: Tensor, values: Tensor) -> Tensor:
    """The product, 0 wherever the values are not finite: banned classes have no say."""
    finite = values.isfinite()
    return torch.where(finite, probability * torch.where(finite, values, 0), 0)
