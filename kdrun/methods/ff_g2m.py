"""FF-G2M: full-frequency distillation of a graph network into an MLP (Wu et al.; AAAI 2023).

A graph network is the teacher; the student sees the features of a node and no edges. Matching the
teacher node by node transfers what neighbours have in common and drowns how they differ; here both
are matched along the edges of the graph (arXiv 2305.10758):

    L = label_weight * CE + (1 - label_weight) * (L_low + L_high)
    L_low  = mean over edges and nodes of KL(p^t_j || p^s_i)
    L_high = mean over edges of KL(softmax(|z^t_i - z^t_j| / T) || softmax(|z^s_i - z^s_j| / T))

with logits z ``(N, C)``, class distributions p at temperature 1, and ``L_low`` counting each node
once as its own neighbour. CE is over the labelled nodes, the other terms over all nodes of the
training graph. There is no factor T^2 and no third weight, as in the released code, from which the
formulas are taken. Modes: ``full``; ``lfd`` and ``hfd`` with one of the two terms; ``glnn``, the
divergence at the same node instead (Zhang et al., ICLR 2022); ``mlp``, CE alone and without its
weight. ``high_frequency`` and ``low_frequency`` are recorded in every mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from kdrun.losses.divergence import kl_divergence
from kdrun.losses.edges import difference_divergence, neighbour_divergence
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import Fraction, Positive

TERMS = {
    "full": ("low_frequency", "high_frequency"),
    "lfd": ("low_frequency",),
    "hfd": ("high_frequency",),
    "glnn": ("node",),
    "mlp": (),
}
"""The distillation terms of each mode."""


class FFG2M(Method):
    """Match the teacher's predictions at neighbours, and their differences across edges.

    Args:
        mode: which terms are distilled.
        temperature: T of the differences across edges.
        label_weight: share of the cross-entropy; the distillation terms have the rest.
    """

    relational = True
    needs: ClassVar[tuple[str, ...]] = ("edge_index",)

    def __init__(
        self,
        *,
        mode: Literal["full", "lfd", "hfd", "glnn", "mlp"] = "full",
        temperature: Positive = 1.5,
        label_weight: Fraction = 0.4,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.temperature = temperature
        self.label_weight = label_weight

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the terms of the mode."""
        ours, theirs = student.logits, teachers["teacher"].logits
        edges = batch.inputs["edge_index"]
        terms = {
            "low_frequency": neighbour_divergence(ours, theirs, edges),
            "high_frequency": difference_divergence(
                ours, theirs, edges, temperature=self.temperature
            ),
        }
        for name, value in terms.items():
            self.record(name, value)
        terms["node"] = kl_divergence(ours, theirs, t_squared=False)
        chosen = {name: terms[name] for name in TERMS[self.mode]}
        return {"supervised": self.supervised_loss(student, batch)} | chosen

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        if self.mode == "mlp":
            return {"supervised": 1.0}
        rest = dict.fromkeys(TERMS[self.mode], 1 - self.label_weight)
        return {"supervised": self.label_weight} | rest
