"""Scores of networks that were never trained: DisWOT (Dong et al., CVPR 2023).

Teacher and candidate have random weights. One labelled batch is run through both; the semantic
distance D_s compares the gradients of the cross-entropy at the two classifiers, the relation
distance D_r how the samples of the batch resemble each other in the last stage's maps. A score is a
distance with its sign turned, so 0 is the best there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdrun.architectures.ranking import ranks
from kdrun.architectures.strategy import Evaluation
from kdrun.data.seeding import stream_seed
from kdrun.inputs import call_network
from kdrun.layers.stages import stage_features
from kdrun.layers.taps import attach, tap_points
from kdrun.losses.affinities import (
    class_map_distance,
    first_sample_channel_relation,
    gradient_affinity_distance,
)
from kdrun.losses.relations import similarity_relation
from kdrun.outputs import Batch, ModelOutput
from kdrun.parameters import NonNegativeInt, PositiveInt, checked_constructor

TEACHER, CANDIDATE = 0, 1
"""Whose random weights a stream is for: the second word of its name."""

Build = Callable[[int], nn.Module]
"""Makes a network whose weights depend on a seed."""


@dataclass(frozen=True)
class Response:
    """How a network responds to a labelled batch.

    Attributes:
        gradient: ``(N, C)`` of the mean cross-entropy at the classifier's weight.
        weight: ``(N, C)`` the classifier's weight.
        maps: ``(B, C, H, W)`` of the last stage.
    """

    gradient: Tensor
    weight: Tensor
    maps: Tensor


def respond(network: nn.Module, batch: Batch) -> Response:
    """Run a network in training mode, so that batch normalisation uses the batch.

    Raises:
        ValueError: the network has no linear classifier, or no stages of maps.
    """
    place = tap_points(network, batch.inputs).get("penultimate", "")
    classifier = network.get_submodule(place.removeprefix("input:")) if place else None
    if not isinstance(classifier, nn.Linear):
        raise ValueError(f"{type(network).__name__} has no linear classifier to take a gradient of")
    taps = attach(network, ("stages",), sample=batch.inputs)
    network.train().requires_grad_(False)
    classifier.weight.requires_grad_(True)
    with taps:
        logits = call_network(network, batch.inputs)
    loss = nn.functional.cross_entropy(logits, batch.target)
    (gradient,) = torch.autograd.grad(loss, classifier.weight)
    maps = stage_features(ModelOutput(logits, taps.collect()))[-1]
    taps.remove()
    return Response(gradient, classifier.weight.detach(), maps.detach())


@torch.no_grad()
def gaussian(network: nn.Module, seed: int) -> nn.Module:
    """Weights of convolutions and linear layers from N(0, 1), their biases 0; batch normalisation
    with weight 1 and bias 0. The same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    return network


class UntrainedDistance:
    """Scores candidates by their distance from a teacher, all with random weights.

    Args:
        batch_size: of the one batch; 64, and 128 or 32 in other searches of the released code.
        batch_seed: chooses the batch; null: the run's seed.
        teacher_seed: of the teacher's random weights; null: the run's seed.
        candidate_seed: of every candidate's random weights; null: the run's seed.
        repetitions: weights of each candidate whose scores are averaged.
        init: ``gaussian`` weights of variance 1, or each network's ``default``.
        semantic: ``fc_grad`` is the released code's distance, ``cam`` the one the paper describes.
        relation: between samples (``batch``), or as one script of the released code computes it,
            between channels of the first sample (``first_sample_channels``).
        combine: ``sum`` of both scores, sum of their ranks, or one of them.
    """

    scores: ClassVar[tuple[str, ...]] = ("semantic", "relation")

    @checked_constructor
    def __init__(
        self,
        *,
        batch_size: PositiveInt = 64,
        batch_seed: NonNegativeInt | None = None,
        teacher_seed: NonNegativeInt | None = None,
        candidate_seed: NonNegativeInt | None = None,
        repetitions: PositiveInt = 1,
        init: Literal["gaussian", "default"] = "gaussian",
        semantic: Literal["fc_grad", "cam"] = "fc_grad",
        relation: Literal["batch", "first_sample_channels"] = "batch",
        combine: Literal["sum", "rank_sum", "semantic", "relation"] = "sum",
    ) -> None:
        self.batch_size, self.batch_seed = batch_size, batch_seed
        self.teacher_seed, self.candidate_seed = teacher_seed, candidate_seed
        self.repetitions, self.init = repetitions, init
        self.semantic, self.relation, self.combine = semantic, relation, combine

    def seeded(self, seed: int) -> UntrainedDistance:
        """The same, with ``seed`` in place of every seed that is None."""
        return UntrainedDistance(
            **{
                name: seed if name.endswith("_seed") and value is None else value
                for name, value in vars(self).items()
            }
        )

    def open(self, teacher: Build, batch: Batch) -> Callable[[Build], dict[str, float]]:
        """What scores a candidate against one teacher on one batch, both fixed from now on.

        The function gives the two scores and ``gradient_norm``, for comparison.
        """
        # Streams of their own: a candidate with the teacher's seed is no copy of it.
        reference = respond(self._built(teacher, stream_seed(self.teacher_seed, TEACHER)), batch)

        def score(candidate: Build) -> dict[str, float]:
            sums = torch.zeros(3)
            for repetition in range(self.repetitions):
                seed = stream_seed(self.candidate_seed, CANDIDATE, repetition)
                found = respond(self._built(candidate, seed), batch)
                sums += torch.tensor(
                    [
                        -float(self._semantic(found, reference)),
                        -float(self._relation(found, reference)),
                        float(found.gradient.norm()),
                    ]
                )
            names = ("semantic", "relation", "gradient_norm")
            return dict(zip(names, (sums / self.repetitions).tolist(), strict=True))

        return score

    def ranking(self, evaluations: Sequence[Evaluation]) -> list[float]:
        """How good candidates are, the larger the better."""
        semantic, relation = (
            [each.scores[name] for each in evaluations] for name in ("semantic", "relation")
        )
        if self.combine in ("semantic", "relation"):
            return semantic if self.combine == "semantic" else relation
        if self.combine == "rank_sum":
            semantic, relation = ranks(semantic), ranks(relation)
        return [a + b for a, b in zip(semantic, relation, strict=True)]

    def _built(self, build: Build, seed: int) -> nn.Module:
        network = build(seed)
        return gaussian(network, seed) if self.init == "gaussian" else network

    def _semantic(self, student: Response, teacher: Response) -> Tensor:
        if self.semantic == "fc_grad":
            return gradient_affinity_distance(student.gradient, teacher.gradient)
        return class_map_distance(student.weight, student.maps, teacher.weight, teacher.maps)

    def _relation(self, student: Response, teacher: Response) -> Tensor:
        if self.relation == "batch":
            return similarity_relation(student.maps, teacher.maps)
        return first_sample_channel_relation(student.maps, teacher.maps)
