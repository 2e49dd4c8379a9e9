"""Token-level divergences: KL either way, JSD, TVD, skewed, adaptive (Wen et al. 2023 to 2025).

The objectives that tables of language-model distillation compare, with p the teacher's distribution
over the vocabulary and q the student's, at every position, mean over the positions that count:

    L = weight * mean D(p, q) + supervised_weight * CE,      p, q = softmax(z / T),  z (..., C)

``forward_kl`` KL(p || q) and ``reverse_kl`` KL(q || p); ``symmetric_kl`` between them; ``jsd``
(Agarwal et al., ICLR 2024, GKD); ``tvd`` (Wen et al., ACL 2023, f-DISTILL); ``skew_forward_kl`` and
``skew_reverse_kl`` (Ko et al., ICML 2024, DistiLLM); ``adaptive_kl`` (Wu et al., COLING 2025, AKL);
``alpha_beta`` (Wang et al., ICML 2025, ABKD). Formulas stand at the functions of
``kdrun/losses/distributions.py``.

As in the released code of all of these there is no T^2, and no supervised term unless it is asked
for. Published numbers: DistiLLM skew 0.1; ABKD alpha 0.2, beta 0.7 for language models, and alpha
0.8, beta 0.3, weight 32 beside a supervised weight of 1 from ResNet56 to ResNet20 on CIFAR-100; the
"js" of the DistiLLM and TAID code is ``jsd`` with beta 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.chunked import mean_over_positions
from kdrun.losses.distributions import Options, chosen
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import Fraction, NonNegative, Positive


class Divergence(Method):
    """Match the teacher's distribution at every position by a divergence of choice.

    Args:
        divergence: which one.
        temperature: T, which softens both distributions.
        t_squared: multiply the divergence by T^2.
        beta: weight of the teacher in the mixture of ``jsd``.
        skew: share of the other distribution in the mixture of the skewed ones.
        share: of reverse KL in ``symmetric_kl``.
        head_mass: probability of the head in ``adaptive_kl``.
        alpha: exponent of p in ``alpha_beta``.
        alpha_beta: exponent of q in ``alpha_beta``.
        weight: factor of the divergence.
        supervised_weight: factor of the task's own loss; 0 leaves it out.
    """

    tasks = ("classification", "language_modelling")
    zero_at_equality = True
    lazy_logits = True

    def __init__(
        self,
        *,
        divergence: Literal[
            "forward_kl",
            "reverse_kl",
            "symmetric_kl",
            "jsd",
            "tvd",
            "skew_forward_kl",
            "skew_reverse_kl",
            "adaptive_kl",
            "alpha_beta",
        ] = "forward_kl",
        temperature: Positive = 1.0,
        t_squared: bool = False,
        beta: Fraction = 0.5,
        skew: Fraction = 0.1,
        share: Fraction = 0.9,
        head_mass: Fraction = 0.5,
        alpha: NonNegative = 0.2,
        alpha_beta: NonNegative = 0.7,
        weight: NonNegative = 1.0,
        supervised_weight: NonNegative = 0.0,
    ) -> None:
        super().__init__()
        self.divergence = chosen(
            divergence,
            Options(
                beta=beta,
                skew=skew,
                share=share,
                head_mass=head_mass,
                alpha=alpha,
                alpha_beta=alpha_beta,
            ),
        )
        self.temperature = temperature
        self.weight = weight * (temperature**2 if t_squared else 1.0)
        self.supervised_weight = supervised_weight

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The divergence and, unless its weight is 0, the supervised loss."""
        logits = student.logits, teachers["teacher"].logits
        (divergence,) = mean_over_positions(self.per_position, *logits, mask=batch.mask)
        terms = {"divergence": divergence}
        if self.supervised_weight:
            terms["supervised"] = self.supervised_loss(student, batch)
        return terms

    def per_position(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence of logits ``(N, C)``, as ``(N, 1)``."""
        log_q = F.log_softmax(student / self.temperature, dim=-1)
        log_p = F.log_softmax(teacher / self.temperature, dim=-1)
        return self.divergence(log_q, log_p).unsqueeze(-1)

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors, T^2 included where it is asked for."""
        weights = {"divergence": self.weight}
        if self.supervised_weight:
            weights["supervised"] = self.supervised_weight
        return weights
