"""DisWOT: the student's architecture is searched for without training (Dong et al.; CVPR 2023).

Before anything is trained, candidates are compared with the teacher's architecture, both with
random weights (``kdrun.stages.search``, ``kdrun.architectures``); the candidate at the smallest
distance is the student. It is then distilled by softened logits (arXiv 2303.15678):

    L = supervised_weight * CE + weight * T^2 * KL(p_t || p_s)
        [+ semantic_weight * D_s + relation_weight * D_r]

With ``dagger`` the two distances are losses as well, on the maps A ``(B, C, H, W)`` of the last
stage: D_s compares ``A A^T`` of each sample, D_r the similarities of the samples of a batch. Where
the student has another number of channels, a 1x1 convolution with batch normalisation brings its
maps to the teacher's. D_r sees the batch of one process; it does not look across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kdrun.layers.stages import stage_features
from kdrun.losses.affinities import channel_affinity_distance
from kdrun.losses.divergence import kl_divergence
from kdrun.losses.relations import similarity_relation
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive


class DisWOT(Method):
    """Distil the student that the search has found.

    Args:
        temperature: T, which softens both distributions.
        weight: factor of the divergence.
        supervised_weight: factor of the task's own loss.
        dagger: add the two distances of the search as losses.
        semantic_weight: factor of D_s.
        relation_weight: factor of D_r.
    """

    relational = True
    zero_at_equality = True

    def __init__(
        self,
        *,
        temperature: Positive = 4.0,
        weight: NonNegative = 0.9,
        supervised_weight: NonNegative = 0.1,
        dagger: bool = False,
        semantic_weight: NonNegative = 1.0,
        relation_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = weight
        self.supervised_weight = supervised_weight
        self.dagger = dagger
        self.semantic_weight = semantic_weight
        self.relation_weight = relation_weight
        self.projector: nn.Module = nn.Identity()

    def taps(self) -> Taps:
        """The stages of both, of which the last is compared; nothing without ``dagger``."""
        return {"student": ("stages",), "teacher": ("stages",)} if self.dagger else {}

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build the projector where the numbers of channels differ."""
        if not self.dagger:
            return
        ours, theirs = (stage_features(o)[-1].shape[1] for o in (student, teachers["teacher"]))
        if ours != theirs:
            convolution = nn.Conv2d(ours, theirs, 1, bias=False)
            self.projector = nn.Sequential(convolution, nn.BatchNorm2d(theirs))

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss, the divergence and, with ``dagger``, both distances."""
        teacher = teachers["teacher"]
        terms = {
            "supervised": self.supervised_loss(student, batch),
            "kd": kl_divergence(
                student.logits,
                teacher.logits,
                temperature=self.temperature,
                t_squared=True,
                mask=batch.mask,
            ),
        }
        if self.dagger:
            ours = self.projector(stage_features(student)[-1])
            theirs = stage_features(teacher)[-1]
            terms["semantic"] = channel_affinity_distance(ours, theirs)
            terms["relation"] = similarity_relation(ours, theirs)
        return terms

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        weights = {"supervised": self.supervised_weight, "kd": self.weight}
        if self.dagger:
            weights |= {"semantic": self.semantic_weight, "relation": self.relation_weight}
        return weights
