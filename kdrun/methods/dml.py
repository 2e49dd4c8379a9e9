"""Deep mutual learning (Zhang, Xiang, Hospedales, Lu; CVPR 2018).

There is no teacher: K networks of the student's kind, each from its own start, learn together and
from each other (arXiv 1706.00384, equations 4-8):

    L_k = CE(z_k, y) + weight / (K - 1) * sum_{j != k} KL(softmax(z_j) || softmax(z_k))

with logits z ``(..., C)``; the other networks' predictions are constants in L_k. All networks are
updated at once from the same predictions; the paper updates one after the other. The first network
is the student that is evaluated and ships.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdrun.losses.divergence import kl_divergence
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, PositiveInt

STUDENT = "student"


class DML(Method):
    """Train several students that teach each other.

    Args:
        peers: networks besides the student, K - 1.
        weight: factor of each network's divergence from the others.
        supervised_weight: factor of the task's own loss of every network.
    """

    trainable_roles = ("peer1",)
    zero_at_equality = True

    def __init__(
        self,
        *,
        peers: PositiveInt = 1,
        weight: NonNegative = 1.0,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.trainable_roles = tuple(f"peer{number}" for number in range(1, peers + 1))
        self.weight = weight
        self.supervised_weight = supervised_weight

    def roles(self) -> Mapping[str, str]:
        """Every peer is built as the student is."""
        return dict.fromkeys(self.trainable_roles, STUDENT)

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """A supervised and a mutual term of every network."""
        outputs = {STUDENT: student, **teachers}
        terms = {}
        for role, output in outputs.items():
            divergences = [
                kl_divergence(
                    output.logits, other.logits.detach(), t_squared=False, mask=batch.mask
                )
                for other in outputs.values()
                if other is not output
            ]
            ending = "" if role == STUDENT else f"_{role}"
            terms[f"supervised{ending}"] = self.supervised_loss(output, batch)
            terms[f"mutual{ending}"] = torch.stack(divergences).mean()
        return terms

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        weights = {}
        for ending in ("", *(f"_{role}" for role in self.trainable_roles)):
            weights[f"supervised{ending}"] = self.supervised_weight
            weights[f"mutual{ending}"] = self.weight
        return weights
