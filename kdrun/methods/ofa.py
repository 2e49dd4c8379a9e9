"""OFA-KD: one for all, distillation between architectures of any family (Hao et al.; NeurIPS 2023).

Features of a convolutional network, a transformer and an MLP-mixer cannot be compared. So they are
not: an exit at each stage of the student maps its features to logits, and every exit, like the
final logits, learns from the teacher's final logits alone (Hao, Guo, Han, Tang, Hu, Wang;
arXiv 2310.19444):

    L = supervised_weight * CE(z, y) + weight * OFA(z; e_0) + exit_weight * sum_k OFA(z_k; e_k)
    OFA(z; e) = mean_n sum_c -[(p_c + m_c)^e - m_c] log q_c,
        p = softmax(t / T),  q = softmax(z / T),  m = 1 for the target class, else 0

with logits z ``(B, C)``. The more the teacher trusts the target class, the more its weight exceeds
p. At e = 1 this is the cross-entropy to the teacher. There is no factor T^2.

This is the released code. The paper has the exponent on the target class alone and the hard label
inside each term, ``-(1 + p_y)^e log q_y - sum_{c != y} p_c log q_c`` (as recalled). That is
``variant: paper``, which needs no further cross-entropy. Of mixed or smoothed targets the most
probable class counts in m. The exits are built for the student: separable convolutions for maps,
patch merging and transformer blocks for tokens (``kdrun.layers.exits``; the blocks have biases in
their attention, unlike those of the code). They are trained with the student and do not ship.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun.layers.exits import ExitedNetwork, TokenExit, convolutional_exit
from kdrun.layers.layout import as_map, as_tokens
from kdrun.layers.surgery import find_classifier
from kdrun.layers.taps import tap_layout, tap_points
from kdrun.losses.precision import full_precision
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive, PositiveInt

Variant = Literal["code", "paper"]


def target_enhanced_coefficients(
    teacher: Tensor, target: Tensor, *, exponent: float, variant: Variant
) -> Tensor:
    """What multiplies ``-log q`` of each class, ``(B, C)``, at least 0.

    Args:
        teacher: probabilities ``(B, C)``.
        target: class ids ``(B,)``.
        exponent: e; 1 gives the probabilities.
        variant: ``code`` ``(p + m)^e - m``; ``paper`` ``(1 + p_y)^e`` of the target, p of others.
    """
    is_target = F.one_hot(target, teacher.shape[-1]).to(teacher.dtype)
    if variant == "code":
        return (teacher + is_target) ** exponent - is_target
    return torch.where(is_target > 0, (1 + teacher) ** exponent, teacher)


@full_precision
def target_enhanced_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    exponent: float,
    temperature: float = 1.0,
    variant: Variant = "code",
) -> Tensor:
    """Cross-entropy to the teacher with a stronger target class, mean over samples, without T^2.

    Args:
        student: logits ``(B, C)``.
        teacher: logits ``(B, C)``, constants.
        target: class ids ``(B,)``, or class probabilities ``(B, C)``, of which the largest counts.
        exponent: e, how much the target class gains.
        temperature: T, which softens both distributions.
        variant: see ``target_enhanced_coefficients``.
    """
    if target.ndim == student.ndim:
        target = target.argmax(dim=-1)
    probabilities = F.softmax(teacher.detach() / temperature, dim=-1)
    coefficients = target_enhanced_coefficients(
        probabilities, target, exponent=exponent, variant=variant
    )
    log_q = F.log_softmax(student / temperature, dim=-1)
    return -(coefficients * log_q).sum(dim=-1).mean()


class OFA(Method):
    """Distil the teacher's logits into exits of the student.

    Args:
        exponent: e of every term; or a list, one for each exit and the last for the final logits.
        stages: of the student that have an exit, counted from 1; null: all; none: logits alone.
        temperature: T, which softens both distributions.
        variant: the loss as ``code`` or ``paper`` have it.
        final_grid: side of the square of patches after the merging of an exit from tokens.
        weight: factor of the term of the final logits.
        exit_weight: factor of the term of each exit.
        supervised_weight: factor of the task's own loss.
    """

    def __init__(
        self,
        *,
        exponent: Positive | list[Positive] = 1.0,
        stages: list[PositiveInt] | None = None,
        temperature: Positive = 1.0,
        variant: Literal["code", "paper"] = "code",
        final_grid: PositiveInt = 7,
        weight: NonNegative = 1.0,
        exit_weight: NonNegative = 1.0,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.exponent = exponent
        self.stages = stages
        self.temperature = temperature
        self.variant: Variant = variant
        self.final_grid = final_grid
        self.weight, self.exit_weight = weight, exit_weight
        self.supervised_weight = supervised_weight

    def wrap(self, student: nn.Module, teachers: Mapping[str, nn.Module], sample: Any) -> nn.Module:
        """Find the student's stages and the widths before both classifiers.

        Raises:
            ValueError: a student without image features or without such a stage, exponents that do
                not match, or networks that do not end in a linear classifier.
        """
        self._layout = tap_layout(student)
        if self._layout is None:
            raise ValueError(f"exits read maps or tokens; {type(student).__name__} has neither")
        points = tap_points(student, sample)
        stages = sorted(int(name[5:]) for name in points if name.removeprefix("stage").isdigit())
        self._depth = len(stages)
        self._chosen = stages if self.stages is None else sorted(set(self.stages))
        if not set(self._chosen) <= set(stages):
            raise ValueError(f"stages={self.stages}: the student has the stages {stages}")
        count = len(self._chosen) + 1
        given = self.exponent if isinstance(self.exponent, list) else [self.exponent] * count
        if len(given) != count:
            raise ValueError(f"{len(given)} exponents for {count - 1} exits and the final logits")
        self._exponents = given
        self._locations = {stage: points[f"stage{stage}"] for stage in self._chosen}
        networks = (student, teachers["teacher"])
        self._widths = [
            network.get_submodule(find_classifier(network, sample)).in_features
            for network in networks
        ]
        return student

    def taps(self) -> Taps:
        """The chosen stages of the student as the network gives them."""
        return {"student": tuple(f"stage{stage}.raw" for stage in self._chosen)}

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build an exit for each stage."""
        classes = student.logits.shape[-1]
        self.exits = nn.ModuleDict()
        for stage in self._chosen:
            remaining = self._depth - stage
            feature = self._formed(student.features[f"stage{stage}"])
            if feature.ndim == 4:
                branch: nn.Module = convolutional_exit(
                    feature.shape[1], halvings=remaining, width=max(self._widths), classes=classes
                )
            else:
                branch = TokenExit(
                    grid=self._layout.grid(feature)[0],
                    special=self._layout.special_tokens_of(feature),
                    channels=feature.shape[-1],
                    width=self._widths[0],
                    final_grid=self.final_grid,
                    depth=max(remaining, 1),
                    classes=classes,
                )
            self.exits[f"exit{stage}"] = branch

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss, the term of the final logits, and one of each exit."""
        predictions = {
            f"exit{stage}": self.exits[f"exit{stage}"](
                self._formed(student.features[f"stage{stage}"])
            )
            for stage in self._chosen
        }
        predictions["distillation"] = student.logits
        terms = {}
        if self.variant == "code":
            terms["supervised"] = self.supervised_loss(student, batch)
        for (name, logits), exponent in zip(predictions.items(), self._exponents, strict=True):
            terms[name] = target_enhanced_cross_entropy(
                logits,
                teachers["teacher"].logits,
                batch.target,
                exponent=exponent,
                temperature=self.temperature,
                variant=self.variant,
            )
        return terms

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        weights = {name: self.exit_weight for name in self.exits}
        if self.variant == "code":
            weights["supervised"] = self.supervised_weight
        return weights | {"distillation": self.weight}

    def companions(self, student: nn.Module) -> dict[str, nn.Module]:
        """The student left by each of its exits."""
        return {
            f"exit{stage}": ExitedNetwork(
                student, self._locations[stage], self._formed, self.exits[f"exit{stage}"]
            )
            for stage in self._chosen
        }

    def _formed(self, feature: Tensor) -> Tensor:
        """A stage feature as a map ``(B, C, H, W)``, or as tokens where it is none."""
        if feature.ndim == 3 or self._layout.channels_last:
            return as_tokens(feature, self._layout)
        return as_map(feature, self._layout)
