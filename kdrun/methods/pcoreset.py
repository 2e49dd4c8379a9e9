"""PCoreSet: active learning with distillation from vision-language models (Kang et al.; 2025).

Kang, Lee, Jang, Kim, Hwang, arXiv 2506.00910. Few images have labels, more can be bought, and a
frozen vision-language model speaks of all of them. In each round a fresh student is trained as in
DHO (see the method dho); then ``queries`` images are chosen, labelled, and the next round begins.
The teacher's probabilities lie in few clusters of the simplex, and distillation hands that on to
the student. So the images to label are chosen where predictions leave the simplex uncovered:
farthest first among the student's predicted probabilities, from those of the labelled images on.

    i* = argmax_i min_s ||q_i - q_s||_2      q = alpha softmax(c) + (1 - alpha) softmax(k / beta)

There are no labels to search (alpha, beta) with, so the mixture is fixed; for choosing it is always
(0.5, 1). On ImageNet the released script predicts with alpha 0.4 (zero-shot teacher) or 0.2 (CLAP)
and beta 0.5.

Strategies to compare with: ``random``; ``uncertainty``, the largest entropy of q; ``coreset``,
farthest first by the cosine of penultimate features; ``badge``, as the release codes it, or with
the sampling of its paper (``badge_sampling: kmeanspp``); ``classbalanced``.

The release keeps track of images by their place in the shrinking pool, kdrun by their number in the
data set. It also computes all distances anew for every choice; the result is the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdrun.layers.dual_head import DISTILLED, SUPERVISED
from kdrun.method import Selection, Taps
from kdrun.methods.dho import DHO
from kdrun.outputs import ModelOutput
from kdrun.parameters import Fraction, NonNegativeInt, Positive, PositiveInt
from kdrun.selection.strategies import (
    at_random,
    badge,
    badge_kmeanspp,
    class_balanced,
    feature_coreset,
    most_uncertain,
    probability_coreset,
)


class PCoreSet(DHO):
    """Train a two-headed student in rounds; between rounds, choose the samples to label.

    Args:
        strategy: which samples are chosen; see the head of this module.
        score: which probabilities q are chosen by: ``mixed``, or of the ``supervised`` or the
            ``distilled`` head alone.
        badge_sampling: of ``badge``: ``farthest`` first, or ``kmeanspp``.
        rounds: rounds after the first.
        queries: labels bought between two rounds; null: as many as there are classes.
        final_epochs: epochs of the last round; null: as many as of the others.
        temperature: T, which softens both distributions.
        supervised_weight: lambda, of the supervised term; at 1 there is no distillation.
        heads: ``dual``, or ``single``: both losses on one head, to compare with.
        head_init: ``fresh`` or ``classifier``: how the distilled head starts; see dho.
        alpha: weight of the supervised head in predictions.
        beta: temperature of the distilled head in predictions.
        joint_pass: run labelled and unlabelled images as one batch.
        conflict_every: see dho.
    """

    def __init__(
        self,
        *,
        strategy: Literal[
            "pcoreset", "random", "uncertainty", "coreset", "badge", "classbalanced"
        ] = "pcoreset",
        score: Literal["mixed", "supervised", "distilled"] = "mixed",
        badge_sampling: Literal["farthest", "kmeanspp"] = "farthest",
        rounds: PositiveInt = 15,
        queries: PositiveInt | None = None,
        final_epochs: PositiveInt | None = None,
        temperature: Positive = 2.0,
        supervised_weight: Fraction = 0.5,
        heads: Literal["dual", "single"] = "dual",
        head_init: Literal["fresh", "classifier"] = "fresh",
        alpha: Fraction = 0.5,
        beta: Positive = 1.0,
        joint_pass: bool = False,
        conflict_every: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            temperature=temperature,
            supervised_weight=supervised_weight,
            heads=heads,
            head_init=head_init,
            mixture="fixed",
            alpha=alpha,
            beta=beta,
            joint_pass=joint_pass,
            conflict_every=conflict_every,
        )
        self.strategy, self.score, self.badge_sampling = strategy, score, badge_sampling
        self.rounds, self.queries, self.final_epochs = rounds, queries, final_epochs

    def taps(self) -> Taps:
        """What either head says, and what both read."""
        return {"student": (*super().taps()["student"], self._features)}

    @property
    def _features(self) -> str:
        return f"input:{self._head_path}"

    def probabilities(self, output: ModelOutput) -> Tensor:
        """The probabilities ``(N, C)`` that samples are chosen by."""
        supervised = self.of_head(output, SUPERVISED).float().softmax(dim=-1)
        distilled = self.of_head(output, DISTILLED).float().softmax(dim=-1)
        # A head that does not learn says nothing of a sample.
        only = {1.0: "supervised", 0.0: "distilled"}.get(self.supervised_weight)
        match only or self.score:
            case "supervised":
                return supervised
            case "distilled":
                return distilled
            case _:
                return (supervised + distilled) / 2

    def select(
        self, pool: ModelOutput, labelled: ModelOutput, target: Tensor, count: int, seed: int
    ) -> Selection:
        """Choose ``count`` rows of the pool by the strategy (see ``kdrun.method.Acquisition``)."""
        generator = torch.Generator().manual_seed(seed)
        q = self.probabilities(pool)
        features = pool.features[self._features]
        match self.strategy:
            case "pcoreset":
                return Selection(*probability_coreset(q, self.probabilities(labelled), count))
            case "coreset":
                known = labelled.features[self._features]
                return Selection(*feature_coreset(features, known, count))
            case "uncertainty":
                rows = most_uncertain(q, count)
            case "badge" if self.badge_sampling == "farthest":
                rows = badge(q, features, count)
            case "badge":
                rows = badge_kmeanspp(q, features, count, generator)
            case "classbalanced":
                rows = class_balanced(q, target, count, generator)
            case _:
                rows = at_random(len(q), count, generator)
        return Selection(rows)
