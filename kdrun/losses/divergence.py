"""Divergences between the class distributions of student and teacher.

Classes are on the last dimension; everything before it is a position (a sample, a token, a
pixel). Every function returns the mean over positions, or over those that ``mask`` marks.
Gradients flow to both sides; the engine detaches frozen teachers. Logits that count are finite; for
classes that are ruled out see ``kdrun.losses.distributions``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrun.losses.precision import full_precision


def mean_over(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of ``values`` over all positions, or over those where ``mask`` is true.

    What stands at masked positions does not change the value, not even NaN. Zero if nothing is
    marked.
    """
    if mask is None:
        return values.mean()
    counted = mask.bool()
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


@full_precision
def standardize(logits: Tensor) -> Tensor:
    """Logits minus their mean over classes, over their unbiased standard deviation plus 1e-7.

    Sun et al., CVPR 2024, algorithm 1: the student need not match the teacher's shift and scale.

    Args:
        logits: ``(..., C)``.
    """
    deviation = logits.std(dim=-1, keepdim=True)
    return (logits - logits.mean(dim=-1, keepdim=True)) / (deviation + 1e-7)


@full_precision
def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of ``softmax(logits / T)`` of ``(..., C)`` in nats, one value per position ``(...)``.

    A class whose probability underflows adds nothing.
    """
    log_p = F.log_softmax(logits / temperature, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


@full_precision
def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    t_squared: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))`` in nats, mean over positions.

    Positions of one side may be broadcast to those of the other.

    Args:
        student: logits ``(..., C)``.
        teacher: logits ``(..., C)``.
        temperature: T, which softens both distributions.
        t_squared: multiply by T^2, which keeps the size of the gradient about independent of T
            (Hinton et al. 2015, section 2.1).
        mask: ``(...)``, true at the positions that count.
    """
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.log_softmax(teacher / temperature, dim=-1)
    factor = _factor(temperature, t_squared)
    if mask is None:
        # Summed at once: the sums of each position and their mean would cost a small step more
        # than the divergence itself.
        total = F.kl_div(student, teacher, reduction="sum", log_target=True)
        shape = student.shape
        if shape != teacher.shape:
            shape = torch.broadcast_shapes(shape, teacher.shape)
        return total * (factor / max(shape[:-1].numel(), 1))
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return mean_over(divergence, mask) * factor


@full_precision
def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    t_squared: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the student's softened distribution under the teacher's, in nats.

    ``-sum_c softmax(teacher / T)_c log_softmax(student / T)_c``, mean over positions. It exceeds
    ``kl_divergence`` by the teacher's entropy, so it has the same gradient but is not zero where
    both agree. Arguments as there.
    """
    student = F.log_softmax(student / temperature, dim=-1)
    teacher = F.softmax(teacher / temperature, dim=-1)
    return mean_over(-(teacher * student).sum(dim=-1), mask) * _factor(temperature, t_squared)


@full_precision
def decoupled_divergence(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float,
    t_squared: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two halves of the KL divergence: of the target class, and among all others.

    Zhao et al., CVPR 2022, equations 5-7. With ``p_y`` the probability of the target, the first is
    ``KL((p_y, 1 - p_y) of the teacher || of the student)``, the second the KL divergence between
    the distributions renormalised over the other classes. At T = 1, per sample,
    ``KL = first + (1 - p_y of the teacher) * second``.

    The official code removes the target by subtracting 1000 from its logit and takes ``log`` of
    ``1 - p_y``; here the target is left out exactly and everything stays in log space.

    Args:
        student: logits ``(..., C)``.
        teacher: logits ``(..., C)``.
        target: class ids ``(...)``.
        temperature: T, which softens both distributions.
        t_squared: multiply both by T^2.
        mask: ``(...)``, true at the positions that count; targets elsewhere are not read.

    Returns:
        The target-class and the non-target-class term.

    Raises:
        ValueError: targets that are no class ids, such as those of mixed samples.
    """
    if target.shape != student.shape[:-1]:
        raise ValueError(
            f"targets must be class ids of shape {tuple(student.shape[:-1])}, got "
            f"{tuple(target.shape)}; mixup and CutMix cannot be decoupled"
        )
    if mask is not None:
        target = torch.where(mask.bool(), target, 0)
    target = target.unsqueeze(-1)
    student_binary, student_others = _split(student / temperature, target)
    teacher_binary, teacher_others = _split(teacher / temperature, target)
    of_target = (teacher_binary.exp() * (teacher_binary - student_binary)).sum(dim=-1)
    among_others = (teacher_others.exp() * (teacher_others - student_others)).sum(dim=-1)
    factor = _factor(temperature, t_squared)
    return mean_over(of_target, mask) * factor, mean_over(among_others, mask) * factor


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``(..., 2)`` of target against rest, and ``(..., C)`` within the rest."""
    others = logits.scatter(-1, target, torch.finfo(logits.dtype).min)
    of_target = logits.gather(-1, target)
    of_others = others.logsumexp(dim=-1, keepdim=True)
    binary = F.log_softmax(torch.cat([of_target, of_others], dim=-1), dim=-1)
    return binary, F.log_softmax(others, dim=-1)


def _factor(temperature: float, t_squared: bool) -> float:
    return temperature**2 if t_squared else 1.0
