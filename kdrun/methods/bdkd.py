"""BD-KD: balancing the divergences for online distillation (Amara et al., arXiv 2022).

A teacher and a smaller student learn together from scratch. The student is pulled by both
divergences from the teacher, and for each sample by one more than by the other: whichever network
is more certain decides (Amara, Sepahvand, Meyer, Gross, Clark; arXiv 2212.12965). With logits z
``(..., C)``, ``p = softmax(z / T)`` and H the entropy,

    L_s = CE(z_s, y) + weight * T^2 * mean(nu KL(p_t || p_s) + delta KL(p_s || p_t))
    L_t = CE(z_t, y) + teacher_weight * T^2 * mean KL(p_s || p_t)

    (nu, delta) = (high, low) where H(p_t) > H(p_s), else (low, high)

so a student that is more confident than its teacher is widened by the forward divergence, and one
that is less is sharpened by the reverse one. In each loss the other network's predictions are
constants. The aim is a better calibrated student.

No code was released and the paper's weights, temperature and form of the weighting are
reconstructed: ``divergence``, ``temperature``, ``high_weight`` and ``low_weight`` are options. (The
code of ABKD, which compares with BD-KD, weighs 3 to 1 at temperature 1.) More networks (``peers``)
are ordered by size: each learns from every larger one as the student does, and from every smaller
one as the teacher does; its divergences are averaged over the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.distributions import forward_kl, reverse_kl
from kdrun.losses.divergence import entropy, mean_over
from kdrun.losses.precision import full_precision
from kdrun.method import Engine, Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, NonNegativeInt, Positive

STUDENT, TEACHER = "student", "teacher"
DivergenceName = Literal["none", "forward", "reverse", "both", "balanced", "continuous"]


@full_precision
def divergence_weights(
    student: Tensor,
    teacher: Tensor,
    *,
    divergence: DivergenceName,
    temperature: float,
    high: float,
    low: float,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """The weights nu of the forward and delta of the reverse divergence, constants ``(...)``.

    Args:
        student: logits ``(..., C)``.
        teacher: logits ``(..., C)``.
        divergence: ``forward`` (1, 0); ``reverse`` (0, 1); ``both`` the mean of ``high`` and
            ``low`` twice; ``balanced`` by whose entropy is larger; ``continuous``
            ``1 + tanh(slope (H_t - H_s))`` and what is left of 2 (ours); ``none`` (0, 0).
        temperature: T, which softens both distributions.
        high: the larger weight.
        low: the smaller weight.
        slope: of ``continuous``, per nat.
    """
    gap = entropy(teacher.detach(), temperature) - entropy(student.detach(), temperature)
    if divergence == "balanced":
        more_confident = gap > 0
        return torch.where(more_confident, high, low), torch.where(more_confident, low, high)
    if divergence == "continuous":
        forward = 1 + torch.tanh(slope * gap)
        return forward, 2 - forward
    mean = (high + low) / 2
    fixed = {"none": (0.0, 0.0), "forward": (1.0, 0.0), "reverse": (0.0, 1.0), "both": (mean, mean)}
    forward, reverse = fixed[divergence]
    return torch.full_like(gap, forward), torch.full_like(gap, reverse)


@full_precision
def weighted_divergences(
    student: Tensor,
    teacher: Tensor,
    forward_weight: Tensor,
    reverse_weight: Tensor,
    *,
    temperature: float,
    t_squared: bool,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Divergences ``forward`` KL(p_t || p_s) and ``reverse`` KL(p_s || p_t), weighted by position.

    Args:
        student: logits ``(..., C)``.
        teacher: logits ``(..., C)``, constants.
        forward_weight: ``(...)``.
        reverse_weight: ``(...)``.
        temperature: T, which softens both distributions.
        t_squared: multiply both by T^2.
        mask: ``(...)``, true at the positions that count.

    Returns:
        The two scalars in nats, means over positions.
    """
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    factor = temperature**2 if t_squared else 1.0
    forward = mean_over(forward_weight * forward_kl(log_q, log_p), mask)
    reverse = mean_over(reverse_weight * reverse_kl(log_q, log_p), mask)
    return {"forward": factor * forward, "reverse": factor * reverse}


class BDKD(Method):
    """Train teacher and student together, with balanced divergences.

    Args:
        divergence: what the student minimises: ``balanced``, ``continuous``, ``both`` (equal
            weights), ``forward`` (deep mutual learning), ``reverse``, or ``none``, which trains
            every network alone.
        temperature: T, which softens both distributions.
        high_weight: of the divergence that is emphasised.
        low_weight: of the other one; not above ``high_weight``.
        slope: of ``continuous``: how fast the weights change with the entropies, per nat.
        weight: factor of the student's divergences.
        teacher_weight: factor of the divergences from smaller networks.
        update: all networks at once from the same predictions, or ``alternating``: one after the
            other, the largest first, each from the newest predictions of the others.
        peers: further networks of the student's kind, in size between teacher and student.
    """

    trainable_roles = (TEACHER,)
    zero_at_equality = True

    def __init__(
        self,
        *,
        divergence: Literal[
            "none", "forward", "reverse", "both", "balanced", "continuous"
        ] = "balanced",
        temperature: Positive = 1.0,
        high_weight: NonNegative = 2.0,
        low_weight: NonNegative = 1.0,
        slope: Positive = 1.0,
        weight: NonNegative = 1.0,
        teacher_weight: NonNegative = 1.0,
        update: Literal["simultaneous", "alternating"] = "simultaneous",
        peers: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        if low_weight > high_weight:
            raise ValueError(f"low_weight={low_weight} must not exceed high_weight={high_weight}")
        self.divergence: DivergenceName = divergence
        self.temperature = temperature
        self.high_weight, self.low_weight, self.slope = high_weight, low_weight, slope
        self.weight, self.teacher_weight = weight, teacher_weight
        self.irregular = update == "alternating"
        self.trainable_roles = (TEACHER, *(f"peer{number}" for number in range(1, peers + 1)))
        self.by_size = (*self.trainable_roles, STUDENT)
        single = {"none": (), "forward": ("forward",), "reverse": ("reverse",)}
        self._directions = single.get(divergence, ("forward", "reverse"))

    def roles(self) -> Mapping[str, str]:
        """The teacher, and peers that are built as the student is."""
        return {role: TEACHER if role == TEACHER else STUDENT for role in self.trainable_roles}

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The terms of every network."""
        outputs = {**teachers, STUDENT: student}
        terms: dict[str, Tensor] = {}
        for role in reversed(self.by_size):
            terms |= self._terms_of(role, outputs, batch)
        return terms

    def step(self, engine: Engine, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Update one network after the other, and renew its predictions for the next."""
        outputs = {role: engine.forward(role, batch) for role in self.by_size}
        weights = self.weights(progress)
        terms: dict[str, Tensor] = {}
        for role in self.by_size:
            own = self._terms_of(role, outputs, batch)
            loss = torch.stack([weights.get(name, 1.0) * term for name, term in own.items()]).sum()
            engine.optimize(loss, role)
            terms |= own
            if role != STUDENT:  # The last one; nobody reads its new predictions.
                with torch.no_grad():
                    outputs[role] = engine.forward(role, batch)
        return terms

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        if self.divergence == "none":
            return {}
        weights = {}
        for place, role in enumerate(self.by_size):
            if place > 0:
                weights |= {_named(name, role): self.weight for name in self._directions}
            if place < len(self.by_size) - 1:
                weights[_named("mutual", role)] = self.teacher_weight
        return weights

    def _terms_of(
        self, role: str, outputs: Mapping[str, ModelOutput], batch: Batch
    ) -> dict[str, Tensor]:
        """What one network minimises: labels, larger networks, smaller networks."""
        logits = outputs[role].logits
        terms = {_named("supervised", role): self.supervised_loss(outputs[role], batch)}
        if self.divergence == "none":
            return terms
        place, others = self.by_size.index(role), len(self.by_size) - 1
        options = {"temperature": self.temperature, "t_squared": True, "mask": batch.mask}
        pairs, mutual = [], []
        for larger in self.by_size[:place]:
            weights = divergence_weights(
                logits,
                outputs[larger].logits,
                divergence=self.divergence,
                temperature=self.temperature,
                high=self.high_weight,
                low=self.low_weight,
                slope=self.slope,
            )
            pairs.append(weighted_divergences(logits, outputs[larger].logits, *weights, **options))
        for smaller in self.by_size[place + 1 :]:
            theirs = outputs[smaller].logits
            ones = torch.ones_like(theirs[..., 0])
            mutual.append(weighted_divergences(logits, theirs, ones, ones, **options)["forward"])
        for name in self._directions if pairs else ():
            terms[_named(name, role)] = torch.stack([pair[name] for pair in pairs]).sum() / others
        if mutual:
            terms[_named("mutual", role)] = torch.stack(mutual).sum() / others
        if role == STUDENT:
            self._record_confidence(logits, outputs[TEACHER].logits, batch.mask)
        return terms

    def _record_confidence(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
        """Note the share of samples of which the student is more certain than the teacher."""
        with torch.no_grad():
            gap = entropy(teacher, self.temperature) - entropy(student, self.temperature)
            self.record("student_more_confident", mean_over((gap > 0).float(), mask))


def _named(term: str, role: str) -> str:
    return term if role == STUDENT else f"{term}_{role}"
