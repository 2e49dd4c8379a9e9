"""SinKD: Sinkhorn distance minimization over the batch (Cui et al.; LREC-COLING 2024).

Cui, Qin, Gao, Zhang, Xu, Wu, Li, Sun, Zhou, Li; arXiv 2402.17110, journal version IEEE TNNLS 2024.
Divergences guide poorly where the distributions of student and teacher hardly overlap. SinKD adds
the cost of transporting the batch of student distributions onto the teacher's:

    L = (1 - alpha) * CE + alpha * L_kd + beta * scale * L_sinkhorn
    p = softmax(z_s / tau), q = softmax(z_t / tau)               (B, C)
    W_ij = sum_c |p_ic - q_jc|                                   (B, B), within [0, 2]
    P = exp(-W / epsilon), rows then columns scaled to sum 1, ``iterations`` times
    L_sinkhorn = sum_ij P_ij W_ij, or that over B where the reduction is the mean

Gradients flow through W, the kernel and every iteration. Where paper and released code differ or
the paper is silent, the code is followed: marginals are ones, so that the sum grows with the batch;
there is neither entropy term nor debiasing, so that it is not zero when both agree; tau is 2
whatever the constructor is given; L_kd is a cross-entropy without T^2. The release scales the
kernel, this file its logarithm: the same plan. The batch is an unordered cloud; only CE and L_kd
know which student sample belongs to which teacher sample. The sample-wise ablation transports each
sample to itself: L_sinkhorn is then the sum of ``|p_i - q_i|_1``, with tau 1.

Each process solves the problem of its own batch, as in the release; ``gather`` makes it one problem
over the batches of all ranks. Diagnostics, of that problem: ``sinkhorn_cost`` (transport cost per
sample), ``sinkhorn_diagonal`` (share of the mass that stays with its own sample) and
``sinkhorn_row_error`` (largest deviation of a row sum from 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from kdrun.losses import distributed
from kdrun.losses.divergence import soft_cross_entropy
from kdrun.losses.feature_maps import mean_squared_error
from kdrun.losses.optimal_transport import pairwise_l1, sinkhorn_plan
from kdrun.losses.precision import full_precision
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import Fraction, NonNegative, Positive, PositiveInt

# Per task, the paper tunes alpha, kd_form and temperature; "glue" carries those of SST-2 and
# conf/method/sinkhorn.yaml lists the others.
PRESETS: dict[str, dict[str, Any]] = {
    # Ours, not the paper's: weights that do not depend on the size of the batch.
    "vision": {
        "alpha": 0.9,
        "kd_form": "kd",
        "temperature": 4.0,
        "t_squared": True,
        "beta": 1.0,
        "scale": 1.0,
        "reduction": "mean",
        "sinkhorn_temperature": 2.0,
        "epsilon": 0.1,
        "iterations": 20,
    },
    # The paper's, for BERT on GLUE.
    "glue": {
        "alpha": 0.9,
        "kd_form": "kd",
        "temperature": 2.0,
        "t_squared": False,
        "beta": 0.8,
        "scale": 1e-3,
        "reduction": "sum",
        "sinkhorn_temperature": 2.0,
        "epsilon": 0.1,
        "iterations": 20,
    },
}

# The sample-wise ablation of the paper has its own temperature, in either preset.
SAMPLEWISE: dict[str, Any] = {"sinkhorn_temperature": 1.0}


@dataclass(frozen=True, slots=True)
class Constants:
    """Every constant of the objective, after the preset is resolved; see ``Sinkhorn``."""

    alpha: float
    kd_form: str
    temperature: float
    t_squared: bool
    beta: float
    scale: float
    reduction: str
    sinkhorn_temperature: float
    epsilon: float
    iterations: int


@full_precision
def transport(
    student: Tensor, teacher: Tensor, *, temperature: float, epsilon: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Transport a batch of student distributions onto the teacher's.

    Args:
        student: logits ``(B, C)``.
        teacher: logits ``(B, C)``.
        temperature: tau, which softens both distributions.
        epsilon: strength of the entropic regularisation.
        iterations: pairs of row and column steps.

    Returns:
        The plan ``(B, B)``, of total mass B, and the cost ``(B, B)`` it was made for; row i is a
        student sample, column j a teacher sample.
    """
    cost = pairwise_l1(
        F.softmax(student / temperature, dim=-1), F.softmax(teacher / temperature, dim=-1)
    )
    return sinkhorn_plan(cost, epsilon=epsilon, iterations=iterations), cost


@full_precision
def samplewise_distance(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """``sum_c |softmax(student / tau)_c - softmax(teacher / tau)_c|`` of each sample, ``(B,)``."""
    ours = F.softmax(student / temperature, dim=-1)
    theirs = F.softmax(teacher / temperature, dim=-1)
    return (ours - theirs).abs().sum(dim=-1)


class Sinkhorn(Method):
    """Transport the batch of student distributions onto the teacher's.

    ``None`` stands for the value of the preset; whatever is given is used as given.

    Args:
        preset: ``vision`` (ours) or ``glue`` (the paper's weights for text).
        variant: one transport problem per batch, or the ablation with one per sample.
        alpha: share of L_kd; CE has the rest.
        kd_form: ``kd`` keeps the temperature, ``kd_anneal`` lowers it to 1, linearly by epochs.
        temperature: T of L_kd.
        t_squared: multiply L_kd by T^2.
        beta: factor of the Sinkhorn term.
        scale: a second factor of it, which the release keeps apart.
        reduction: ``sum`` over the batch, as released, or ``mean``.
        sinkhorn_temperature: tau, which softens the distributions that are transported.
        epsilon: strength of the entropic regularisation.
        iterations: pairs of row and column steps.
        gather: transport the batches of all ranks together.
    """

    relational = True

    def __init__(
        self,
        *,
        preset: Literal["vision", "glue"] = "vision",
        variant: Literal["batchwise", "samplewise"] = "batchwise",
        alpha: Fraction | None = None,
        kd_form: Literal["kd", "kd_anneal"] | None = None,
        temperature: Positive | None = None,
        t_squared: bool | None = None,
        beta: NonNegative | None = None,
        scale: NonNegative | None = None,
        reduction: Literal["sum", "mean"] | None = None,
        sinkhorn_temperature: Positive | None = None,
        epsilon: Positive | None = None,
        iterations: PositiveInt | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__()
        given = {
            "alpha": alpha,
            "kd_form": kd_form,
            "temperature": temperature,
            "t_squared": t_squared,
            "beta": beta,
            "scale": scale,
            "reduction": reduction,
            "sinkhorn_temperature": sinkhorn_temperature,
            "epsilon": epsilon,
            "iterations": iterations,
        }
        constants = PRESETS[preset] | (SAMPLEWISE if variant == "samplewise" else {})
        constants |= {name: value for name, value in given.items() if value is not None}
        self.constants = Constants(**constants)
        self.variant = variant
        self.gather = gather
        self.is_regression = False

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """A single output is a regression: there is no distribution to transport.

        Raises:
            ValueError: the logits are not ``(B, C)``.
        """
        if student.logits.ndim != 2:
            raise ValueError(f"it compares logits (B, C), got {tuple(student.logits.shape)}")
        self.is_regression = student.logits.shape[1] == 1

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss, L_kd and, unless this is a regression, the transport cost."""
        ours, theirs = student.logits, teachers["teacher"].logits
        supervised = self.supervised_loss(student, batch)
        temperature = self.temperature(progress)
        if self.is_regression:
            error = mean_squared_error(ours / temperature, theirs / temperature)
            return {"supervised": supervised, "kd": error}
        kd = soft_cross_entropy(
            ours, theirs, temperature=temperature, t_squared=self.constants.t_squared
        )
        return {"supervised": supervised, "kd": kd, "sinkhorn": self.sinkhorn(ours, theirs)}

    def sinkhorn(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The unscaled Sinkhorn term of logits ``(B, C)``; records the diagnostics."""
        constants = self.constants
        if self.gather:
            student, teacher = distributed.gather(student), distributed.gather(teacher)
        if self.variant == "samplewise":
            distances = samplewise_distance(
                student, teacher, temperature=constants.sinkhorn_temperature
            )
            total = distances.sum()
        else:
            plan, cost = transport(
                student,
                teacher,
                temperature=constants.sinkhorn_temperature,
                epsilon=constants.epsilon,
                iterations=constants.iterations,
            )
            total = (plan * cost).sum()
            self.record("sinkhorn_diagonal", plan.diagonal().mean())
            self.record("sinkhorn_row_error", (plan.sum(dim=1) - 1).abs().max())
        mean = total / len(student)
        self.record("sinkhorn_cost", mean)
        return total if constants.reduction == "sum" else mean

    def temperature(self, progress: Progress) -> float:
        """T of L_kd in this epoch; annealing is linear from the first epoch to 1 in the last."""
        start = self.constants.temperature
        if self.constants.kd_form == "kd" or progress.epochs == 1:
            return start
        return start + (1.0 - start) * progress.epoch / (progress.epochs - 1)

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        constants = self.constants
        weights = {"supervised": 1.0 - constants.alpha, "kd": constants.alpha}
        if not self.is_regression:
            weights["sinkhorn"] = constants.beta * constants.scale
        return weights
