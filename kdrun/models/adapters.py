"""Few-shot adapters of a frozen zero-shot classifier: Tip-Adapter-F and CLAP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun.models.vision_language import ZeroShot, zero_shot_logits


def tip_logits(
    features: Tensor,
    zero_shot: Tensor,
    keys: Tensor,
    values: Tensor,
    strength: float | Tensor,
    sharpness: float | Tensor,
) -> Tensor:
    """``zero_shot + a exp(-b (1 - f K^T)) V`` (Zhang et al., ECCV 2022, equations 4 to 6).

    Args:
        features: f, ``(B, D)``, made unit vectors here.
        zero_shot: logits ``(B, C)``.
        keys: K, ``(M, D)``, one for each labelled image.
        values: V, ``(M, C)``, their labels one-hot.
        strength: a.
        sharpness: b.
    """
    return zero_shot + strength * cache_logits(affinity(features, keys), values, sharpness)


def affinity(features: Tensor, keys: Tensor) -> Tensor:
    """``f K^T``, ``(B, M)``, of features f ``(B, D)``, made unit vectors here."""
    return F.normalize(features.float(), dim=-1) @ keys.T


def cache_logits(affinities: Tensor, values: Tensor, sharpness: float | Tensor) -> Tensor:
    """``exp(-b (1 - A)) V``, ``(B, C)``, of affinities A ``(B, M)``; see ``tip_logits``."""
    return torch.exp(-sharpness * (1 - affinities)) @ values


def multipliers(probabilities: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """CLAP's weight of each class's constraint ``(C,)``, in [0, 1].

    The mean, over the labelled images of a class, of the zero-shot probability of that class; 0
    for a class without labelled images.

    Args:
        probabilities: zero-shot ``(M, C)``.
        target: ``(M,)``.
        num_classes: C.
    """
    own = probabilities.gather(1, target[:, None]).squeeze(1)
    sums = torch.zeros(num_classes).index_add_(0, target, own)
    return sums / torch.bincount(target, minlength=num_classes).clamp(min=1)


def constraint(prototypes: Tensor, anchors: Tensor, weights: Tensor) -> Tensor:
    """``mean_c a_c |P_c - P0_c|^2``, of prototypes that are not normalised.

    Args:
        prototypes: P, ``(C, D)``.
        anchors: P0, ``(C, D)``.
        weights: a, ``(C,)``.
    """
    return (weights * (prototypes - anchors).square().sum(dim=-1)).mean()


class _Adapted(nn.Module):
    """A frozen zero-shot classifier under something that learns.

    Args:
        base: the classifier; must be a ``ZeroShot``.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if not isinstance(base, ZeroShot):
            raise ValueError(
                f"{type(base).__name__} has no class embeddings to adapt: choose a vision-language "
                "teacher such as teacher=two_tower or teacher=clip"
            )
        self.base = base.requires_grad_(False)
        self.scale = base.scale

    def train(self, mode: bool = True) -> _Adapted:
        """The base stays as it evaluates, whatever the rest does."""
        super().train(mode)
        self.base.eval()
        return self

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.base.encode_image(images)


class TipAdapter(_Adapted):
    """Tip-Adapter-F: a cache of labelled images whose keys learn.

    Args:
        base: the zero-shot classifier.
        keys: ``(M, D)``, unit vectors.
        values: ``(M, C)``, labels one-hot.
        strength: a, of the cache beside the zero-shot logits.
        sharpness: b.
    """

    values: Tensor
    strength: Tensor
    sharpness: Tensor

    def __init__(
        self,
        base: nn.Module,
        keys: Tensor,
        values: Tensor,
        *,
        strength: float = 1.17,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__(base)
        self.keys = nn.Parameter(keys.clone())
        self.register_buffer("values", values.clone())
        self.register_buffer("strength", torch.tensor(float(strength)))
        self.register_buffer("sharpness", torch.tensor(float(sharpness)))

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits ``(B, C)``."""
        return self.of_features(self._features(images), self.strength, self.sharpness)

    def of_features(
        self, features: Tensor, strength: float | Tensor, sharpness: float | Tensor
    ) -> Tensor:
        """Logits of image embeddings ``(B, D)`` for any strength and sharpness."""
        zero_shot = zero_shot_logits(features, self.base.zero_shot_embeddings(), self.scale)
        return tip_logits(features, zero_shot, self.keys, self.values, strength, sharpness)


class ClapClassifier(_Adapted):
    """CLAP: class prototypes that learn, held near the sentences they come from.

    Args:
        base: the zero-shot classifier.
        weights: ``(C,)``, of each class's constraint; see ``multipliers``.
    """

    anchors: Tensor
    weights: Tensor

    def __init__(self, base: nn.Module, weights: Tensor) -> None:
        super().__init__(base)
        anchors = base.prototypes().detach().clone()
        self.prototypes = nn.Parameter(anchors.clone())
        self.register_buffer("anchors", anchors)
        self.register_buffer("weights", weights.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits ``(B, C)``."""
        unit = F.normalize(self.prototypes, dim=-1)
        return zero_shot_logits(self._features(images), unit, self.scale)

    def constraint(self) -> Tensor:
        """How far the prototypes are from their sentences, weighted (``constraint``)."""
        return constraint(self.prototypes, self.anchors, self.weights)
