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

Of sequences ``(B, L, C)`` there is a choice of points. ``label_words``: one point per sequence, its
logits at the first position that counts, over the few tokens that stand for the classes, as the T0
code has it in a comment. ``tokens``: every position that counts, at most ``tokens_at_most`` of them
drawn anew in each step, one problem for the batch. ``tokens_per_sequence``: one problem for each
sequence, summed, as in the authors' Multi-Level OT. What the T0 release runs, a softmax over
positions normalised over the batch, is not offered; nor is its L_kd over padding too, a mean over
the positions that count stands in for it. ``top_k`` keeps the teacher's likeliest classes of the
batch, renormalised on both sides.

Each process solves the problem of its own batch, as in the release; ``gather`` makes it one problem
over the batches of all ranks. Diagnostics, of that problem: ``sinkhorn_cost`` (transport cost per
sample), ``sinkhorn_diagonal`` (share of the mass that stays with its own sample) and
``sinkhorn_row_error`` (largest deviation of a row sum from 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrun.losses import distributed
from kdrun.losses.divergence import soft_cross_entropy
from kdrun.losses.feature_maps import mean_squared_error
from kdrun.losses.optimal_transport import samplewise_distance, transport_of_distributions
from kdrun.losses.points import choose_points
from kdrun.losses.sequence import find_label_words, responses
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt

# The paper's, for BERT on GLUE. It tunes alpha, kd_form and temperature per task; these are those
# of SST-2, and conf/method/sinkhorn.yaml lists the others.
GLUE: dict[str, Any] = {
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
}
PRESETS: dict[str, dict[str, Any]] = {
    "glue": GLUE,
    # The paper's, for T0 and GPT-Neo on prompted SuperGLUE.
    "superglue": GLUE
    | {"supervised_weight": 1.0, "alpha": 0.1, "temperature": 1.0, "beta": 1.0, "scale": 8e-4},
    # Ours, not the paper's: weights that do not depend on the size of the batch.
    "vision": GLUE
    | {"temperature": 4.0, "t_squared": True, "beta": 1.0, "scale": 1.0, "reduction": "mean"},
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
    supervised_weight: float | None = None


class Sinkhorn(Method):
    """Transport the batch of student distributions onto the teacher's.

    ``None`` stands for the value of the preset; whatever is given is used as given.

    Args:
        preset: ``vision`` (ours), ``glue`` or ``superglue`` (the paper's weights for text).
        variant: one transport problem per batch, or the ablation with one per sample.
        supervised_weight: factor of CE; None, with the first two presets: 1 - alpha.
        alpha: share of L_kd.
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
        points: what is transported; None: samples, or the tokens of sequences.
        label_words: token ids that stand for the classes; None: the tokens that come first in the
            training responses.
        tokens_at_most: points of one problem with ``tokens``; more are drawn from.
        top_k: classes that are kept, the teacher's likeliest in the batch; None: all.
    """

    tasks = ("classification", "language_modelling")
    relational = True

    def __init__(
        self,
        *,
        preset: Literal["vision", "glue", "superglue"] = "vision",
        variant: Literal["batchwise", "samplewise"] = "batchwise",
        supervised_weight: NonNegative | None = None,
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
        points: Literal["samples", "label_words", "tokens", "tokens_per_sequence"] | None = None,
        label_words: list[NonNegativeInt] | None = None,
        tokens_at_most: PositiveInt = 256,
        top_k: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        given = {
            "supervised_weight": supervised_weight,
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
        self.points, self.tokens_at_most, self.top_k = points, tokens_at_most, top_k
        self.register_buffer("label_words", None)
        if label_words is not None:
            if len(set(label_words)) < max(2, len(label_words)):
                raise ValueError(f"label_words={label_words}: must be two or more different tokens")
            self.label_words = torch.tensor(label_words)

    def inspect(self, batches: Iterable[Batch]) -> None:
        """Refuse label words that cannot stand for the training responses.

        Raises:
            ValueError: see ``find_label_words``; or no response begins with one that is given.
        """
        if self.points != "label_words":
            return
        if self.label_words is None:
            find_label_words(batches)
            return
        unknown = set(self.label_words.tolist()) - {response[0] for response in responses(batches)}
        if unknown:
            raise ValueError(f"label_words: no training response begins with {min(unknown)}")

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """A single output is a regression: there is no distribution to transport.

        Raises:
            ValueError: the points are not those of such logits, or a label word is no token.
        """
        shape = tuple(student.logits.shape)
        if self.points is None:
            self.points = "samples" if len(shape) == 2 else "tokens"
        if len(shape) != (2 if self.points == "samples" else 3):
            raise ValueError(f"points={self.points}: not for logits of shape {shape}")
        if self.variant == "samplewise" and self.points == "tokens_per_sequence":
            raise ValueError("variant=samplewise has no batch to cut into sequences: points=tokens")
        self.is_regression = shape[-1] == 1
        largest = -1 if self.label_words is None else int(self.label_words.max())
        if largest >= shape[-1]:
            raise ValueError(f"label_words: {largest} is no token, the vocabulary has {shape[-1]}")

    def prepare(self, teachers: Mapping[str, nn.Module], loader: Iterable[Batch]) -> None:
        """Find the label words: the tokens that come first in the training responses."""
        if self.points != "label_words" or self.label_words is not None:
            return
        words = find_label_words(loader)
        parameters = (p for network in teachers.values() for p in network.parameters())
        device = next((parameter.device for parameter in parameters), words.device)
        # Each process has seen its part of the data; all must compare the same words.
        self.label_words = distributed.gather(words.to(device)).unique()

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
            ours,
            theirs,
            temperature=temperature,
            t_squared=self.constants.t_squared,
            mask=batch.mask,
        )
        chosen = self.chosen(ours, theirs, batch.mask)
        weight = None if batch.mask is None else batch.mask.sum()
        return {"supervised": supervised, "kd": kd, "sinkhorn": self.sinkhorn(*chosen, weight)}

    def chosen(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The logits of the points, and which of these count; None: all of them."""
        if self.label_words is not None:
            self.label_words = self.label_words.to(student.device)
        return choose_points(
            student,
            teacher,
            mask,
            points=self.points or "samples",
            label_words=self.label_words,
            tokens_at_most=self.tokens_at_most,
            top_k=self.top_k,
        )

    def sinkhorn(
        self,
        student: Tensor,
        teacher: Tensor,
        counted: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The unscaled Sinkhorn term of points ``(..., N, C)``; records the diagnostics.

        Args:
            student: logits.
            teacher: logits.
            counted: ``(..., N)``, true at the points that take part; None: all do.
            weight: of this rank's batch among those of all; see ``distributed.gather``.
        """
        constants = self.constants
        if self.gather:
            student = distributed.gather(student, weight)
            teacher = distributed.gather(teacher)
            counted = None if counted is None else distributed.gather(counted)
        if self.variant == "samplewise":
            distances = samplewise_distance(
                student, teacher, temperature=constants.sinkhorn_temperature
            )
            total = distances.sum() if counted is None else (distances * counted).sum()
        else:
            plan, cost = transport_of_distributions(
                student,
                teacher,
                temperature=constants.sinkhorn_temperature,
                epsilon=constants.epsilon,
                iterations=constants.iterations,
                counted=counted,
            )
            total = (plan * cost).sum()
            takes_part = plan.new_ones(plan.shape[:-1]) if counted is None else counted.to(plan)
            stays = plan.diagonal(dim1=-2, dim2=-1).sum() / takes_part.sum().clamp(min=1)
            self.record("sinkhorn_diagonal", stays)
            self.record("sinkhorn_row_error", (plan.sum(dim=-1) - takes_part).abs().max())
        number = len(student) if counted is None else counted.sum().clamp(min=1)
        mean = total / number
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
        supervised = constants.supervised_weight
        supervised = 1.0 - constants.alpha if supervised is None else supervised
        weights = {"supervised": supervised, "kd": constants.alpha}
        if not self.is_regression:
            weights["sinkhorn"] = constants.beta * constants.scale
        return weights
