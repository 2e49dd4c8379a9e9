"""DHO: semi-supervised distillation from vision-language models by two heads (Kang et al.; 2025).

Kang, Lee, Jang, Hwang, arXiv 2505.07675. A frozen vision-language model gives class probabilities
for any image; few images have labels. Cross-entropy on labels and divergence from the teacher pull
the features of one head in different directions, so each gets a head of its own on one backbone:

    L = lambda CE(c_l, y) + (1 - lambda) (KL_l + KL_u)
    KL = T^2 KL(softmax(t / T) || softmax(k / T))

with c and k ``(B, C)`` the logits of the supervised and the distilled head, t those of the teacher,
l the labelled and u the unlabelled batch. Each divergence is the mean over its own batch; their sum
is not divided by two. The student predicts with

    p = alpha softmax(c) + (1 - alpha) softmax(k / beta)

where (alpha, beta) is searched on validation before each evaluation (``mixture: searched``), so the
best epoch is kept with the pair that it was best with.

Where the released code differs from kdrun, or two of its scripts from each other:

- With few labels of ImageNet (1 %, 10 %) it adds the three terms unweighted (``combination: sum``),
  reads normalised features in the distilled head and scales them by 100, the bias included
  (``distilled_head: cosine``), starts both heads as the student's text classifier (``head_init:
  classifier``, for a student that has one, such as ``student=clip student.head=linear``), and
  predicts with alpha = beta = 0.5 (``mixture: fixed``).
- On ImageNet it runs labelled and unlabelled images as one batch (``joint_pass``), elsewhere one
  after the other.
- On few-shot ImageNet it searches (alpha, beta) and the epoch on the test set. kdrun does so only
  under ``protocol=paper``.
- Its low-shot evaluation keeps the augmentation of training by a default argument; here evaluation
  has none.
- It takes a class with fewer images than ``shots`` with replacement; kdrun refuses.

With several processes each computes its divergences on its part of both batches, which is exact
where a batch divides evenly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrun.layers.dual_head import (
    DISTILLED,
    SUPERVISED,
    CosineHead,
    DualHead,
    best_mixture,
    count_correct,
)
from kdrun.layers.surgery import find_classifier, replace_module
from kdrun.losses.distributed import sum_over_ranks
from kdrun.losses.divergence import kl_divergence
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import Fraction, NonNegativeInt, Positive

ALPHAS = tuple(step / 20 for step in range(21))
"""Weights of the supervised head that are tried."""
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
"""Temperatures of the distilled head that are tried."""


class DHO(Method):
    """Learn labels and the teacher's outputs in two heads, and mix their predictions.

    Args:
        temperature: T, which softens both distributions.
        supervised_weight: lambda, of the supervised term; the divergences get the rest. At 1 or 0
            only one head learns, and it alone predicts.
        combination: ``convex``: lambda and 1 - lambda; ``sum``: all terms count once.
        heads: ``dual``, or ``single``: both losses on one head, to compare with.
        head_init: ``fresh``: the distilled head starts at random; ``classifier``: as a copy of the
            student's classifier, which the supervised head is.
        distilled_head: ``linear``, or ``cosine``: of normalised features.
        cosine_scale: of the cosine head.
        mixture: ``searched`` on validation before each evaluation, or ``fixed``.
        alpha: weight of the supervised head, before the first search or for good.
        beta: temperature of the distilled head, likewise.
        joint_pass: run labelled and unlabelled images as one batch.
        conflict_every: record the cosine between the gradients that both losses send to the
            backbone every so many steps; 0: never.
    """

    unlabelled = True
    conflict: Tensor

    def __init__(
        self,
        *,
        temperature: Positive = 2.0,
        supervised_weight: Fraction = 0.5,
        combination: Literal["convex", "sum"] = "convex",
        heads: Literal["dual", "single"] = "dual",
        head_init: Literal["fresh", "classifier"] = "fresh",
        distilled_head: Literal["linear", "cosine"] = "linear",
        cosine_scale: Positive = 100.0,
        mixture: Literal["searched", "fixed"] = "searched",
        alpha: Fraction = 0.5,
        beta: Positive = 1.0,
        joint_pass: bool = False,
        conflict_every: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.supervised_weight, self.combination = supervised_weight, combination
        self.heads, self.head_init = heads, head_init
        self.distilled_head, self.cosine_scale = distilled_head, cosine_scale
        self.mixture, self.alpha, self.beta = mixture, alpha, beta
        self.joint = joint_pass
        self.conflict_every = conflict_every
        # The last one measured, so that the mean over an epoch is one of measured values.
        self.register_buffer("conflict", torch.zeros(()))
        if combination == "convex" and supervised_weight in (0.0, 1.0):
            self.mixture, self.alpha = "fixed", supervised_weight

    # -- the student -----------------------------------------------------------------------------

    def wrap(self, student: nn.Module, teachers: Mapping[str, nn.Module], sample: Any) -> nn.Module:
        """Put two heads in the place of the student's classifier.

        Raises:
            ValueError: it does not end in a linear layer.
        """
        path = find_classifier(student, sample)
        classifier = student.get_submodule(path)
        assert isinstance(classifier, nn.Linear)
        self._paths = {SUPERVISED: path, DISTILLED: path}
        if self.heads == "dual":
            head = DualHead(
                classifier, self._second_head(classifier), alpha=self.alpha, beta=self.beta
            )
            replace_module(student, path, head)
            self._paths = {name: f"{path}.{name}" for name in (SUPERVISED, DISTILLED)}
        heads = {id(p) for p in student.get_submodule(path).parameters()}
        # In a plain list, so that the method does not own them.
        self._backbone = [p for p in student.parameters() if id(p) not in heads]
        self._head_path = path
        return student

    def _second_head(self, classifier: nn.Linear) -> nn.Module:
        if self.head_init == "classifier":
            linear = copy.deepcopy(classifier)
        else:
            linear = nn.Linear(classifier.in_features, classifier.out_features)
        return CosineHead(linear, self.cosine_scale) if self.distilled_head == "cosine" else linear

    def taps(self) -> Taps:
        """What either head says."""
        return {"student": tuple(dict.fromkeys(self._tap(name) for name in self._paths))}

    def _tap(self, head: str) -> str:
        return f"module:{self._paths[head]}"

    def of_head(self, output: ModelOutput, head: str) -> Tensor:
        """The logits ``(B, C)`` of one of the heads."""
        return output.features[self._tap(head)]

    # -- training --------------------------------------------------------------------------------

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Cross-entropy of one head, divergences of the other on both batches."""
        teacher = teachers["teacher"]
        assert student.unlabelled is not None and teacher.unlabelled is not None
        supervised = ModelOutput(self.of_head(student, SUPERVISED))
        terms = {
            "supervised": self.supervised_loss(supervised, batch),
            "labelled": self._divergence(student, teacher),
            "unlabelled": self._divergence(student.unlabelled, teacher.unlabelled),
        }
        if self.conflict_every and progress.step % self.conflict_every == 0:
            distilled = terms["labelled"] + terms["unlabelled"]
            cosine = gradient_cosine(terms["supervised"], distilled, self._backbone)
            self.conflict.copy_(cosine)
        if self.conflict_every:
            self.record("gradient_cosine", self.conflict)
        return terms

    def _divergence(self, student: ModelOutput, teacher: ModelOutput) -> Tensor:
        return kl_divergence(
            self.of_head(student, DISTILLED),
            teacher.logits,
            temperature=self.temperature,
            t_squared=True,
        )

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        if self.combination == "sum":
            return {}
        rest = 1 - self.supervised_weight
        return {"supervised": self.supervised_weight, "labelled": rest, "unlabelled": rest}

    # -- prediction ------------------------------------------------------------------------------

    def calibrate(self, student: nn.Module, outputs: Iterable[tuple[ModelOutput, Batch]]) -> None:
        """Search (alpha, beta) on validation."""
        if self.mixture == "fixed" or self.heads == "single":
            return
        counts = torch.stack(
            [
                count_correct(
                    self.of_head(output, SUPERVISED),
                    self.of_head(output, DISTILLED),
                    batch.target,
                    alphas=ALPHAS,
                    betas=BETAS,
                )
                for output, batch in outputs
            ]
        ).sum(dim=0)
        head = student.get_submodule(self._head_path)
        assert isinstance(head, DualHead)
        head.set_mixture(*best_mixture(sum_over_ranks(counts), alphas=ALPHAS, betas=BETAS))


def gradient_cosine(first: Tensor, second: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Cosine between the gradients of two losses at some parameters; the graphs are kept.

    Args:
        first: a scalar loss.
        second: another.
        parameters: of the backbone that both share.
    """
    gradients = []
    for loss in (first, second):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        gradients.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    return torch.nn.functional.cosine_similarity(*gradients, dim=0)
