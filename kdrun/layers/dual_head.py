"""Two linear heads on one backbone, one for labels, one for a teacher, mixed in predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SUPERVISED, DISTILLED = "supervised", "distilled"
"""The two heads, by the names of the sub-modules of ``DualHead``."""


def mix_heads(
    supervised: Tensor, distilled: Tensor, *, alpha: float | Tensor, beta: float | Tensor
) -> Tensor:
    """Log-probabilities ``log(alpha softmax(supervised) + (1 - alpha) softmax(distilled / beta))``.

    Probabilities are mixed, not logits (Kang et al., arXiv 2505.07675, section 3). The logarithm
    makes the result logits whose softmax is the mixture.

    Args:
        supervised: logits ``(..., C)``.
        distilled: logits ``(..., C)``.
        alpha: weight of the supervised head, in [0, 1].
        beta: temperature of the distilled head.
    """
    ours = F.log_softmax(supervised, dim=-1)
    theirs = F.log_softmax(distilled / beta, dim=-1)
    alpha = torch.as_tensor(alpha, dtype=ours.dtype, device=ours.device)
    # In log space: no probability underflows, and a head with weight 0 is left out exactly.
    return torch.logaddexp(ours + alpha.log(), theirs + (1 - alpha).log())


def count_correct(
    supervised: Tensor,
    distilled: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float],
    betas: Sequence[float],
) -> Tensor:
    """How many samples each mixture classifies rightly, ``(len(betas), len(alphas))`` int64.

    Args:
        supervised: logits ``(B, C)``.
        distilled: logits ``(B, C)``.
        target: class ids ``(B,)``.
        alphas: weights of the supervised head.
        betas: temperatures of the distilled head.
    """
    ours = F.softmax(supervised.float(), dim=-1)
    weights = torch.tensor(alphas, device=ours.device).view(-1, 1, 1)
    counts = []
    for beta in betas:
        theirs = F.softmax(distilled.float() / beta, dim=-1)
        mixed = weights * ours + (1 - weights) * theirs
        counts.append((mixed.argmax(dim=-1) == target).sum(dim=-1))
    return torch.stack(counts)


def best_mixture(
    counts: Tensor, *, alphas: Sequence[float], betas: Sequence[float]
) -> tuple[float, float]:
    """``(alpha, beta)`` with the most right answers; the first such in the order of ``betas``, and
    of ``alphas`` within one.

    Args:
        counts: ``(len(betas), len(alphas))``, see ``count_correct``.
        alphas: as there.
        betas: as there.
    """
    row, column = divmod(int(counts.flatten().argmax()), len(alphas))
    return alphas[column], betas[row]


class CosineHead(nn.Module):
    """``scale * (W z / |z| + b)``: a linear head that reads directions, its bias scaled as well."""

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, D)`` to logits ``(B, C)``."""
        return self.scale * self.linear(F.normalize(features, dim=-1))


class DualHead(nn.Module):
    """Takes the place of a classifier; gives the log-probabilities of the mixture of two heads.

    The heads themselves are the sub-modules ``supervised`` and ``distilled``, to be tapped.

    Args:
        supervised: the head that learns from labels.
        distilled: the head that learns from a teacher.
        alpha: weight of the supervised head.
        beta: temperature of the distilled head.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self, supervised: nn.Module, distilled: nn.Module, *, alpha: float, beta: float
    ) -> None:
        super().__init__()
        self.supervised, self.distilled = supervised, distilled
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))

    def set_mixture(self, alpha: float, beta: float) -> None:
        """Predict with another mixture from now on."""
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, D)`` to log-probabilities ``(B, C)``."""
        supervised, distilled = self.supervised(features), self.distilled(features)
        return mix_heads(supervised, distilled, alpha=self.alpha, beta=self.beta)
