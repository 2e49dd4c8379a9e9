"""Vision-language models as classifiers: class names in sentences, embedded, are the classifier.

A model needs ``encode_image`` and ``encode_text``; everything else is built on these two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Average = Literal["norm_mean_norm", "norm_mean", "raw_mean"]
"""How the embeddings of a class's sentences become one: see ``class_embeddings``."""

Prompts = Sequence[Sequence[str]]
"""The sentences of each class, by class id."""


@runtime_checkable
class ZeroShot(Protocol):
    """A classifier by class embeddings, which few-shot adapters build upon.

    Attributes:
        scale: of the cosines.
    """

    scale: float

    def encode_image(self, images: Tensor) -> Tensor:
        """Images as the data set gives them to embeddings ``(B, D)``."""

    def zero_shot_embeddings(self) -> Tensor:
        """The class embeddings ``(C, D)`` that it classifies with."""

    def prototypes(self) -> Tensor:
        """The class embeddings ``(C, D)`` as ``raw_mean``."""


def class_embeddings(
    encode_text: Callable[[Sequence[str]], Tensor], prompts: Prompts, average: Average
) -> Tensor:
    """One embedding ``(C, D)`` for each class, the mean over its sentences.

    ``norm_mean_norm``: of unit vectors, and made a unit vector again. ``norm_mean``: of unit
    vectors, which leaves it the shorter the more the sentences differ. ``raw_mean``: of embeddings
    as they are.

    Args:
        encode_text: sentences to embeddings ``(N, D)``.
        prompts: at least one sentence for each class.
        average: which mean.

    Raises:
        ValueError: a class without a sentence.
    """
    for number, sentences in enumerate(prompts):
        if not sentences or not all(sentence.strip() for sentence in sentences):
            raise ValueError(f"class {number} has no prompt")
    embedded = encode_text([sentence for sentences in prompts for sentence in sentences]).float()
    if average != "raw_mean":
        embedded = F.normalize(embedded, dim=-1)
    counts = [len(sentences) for sentences in prompts]
    means = torch.stack([part.mean(dim=0) for part in embedded.split(counts)])
    return F.normalize(means, dim=-1) if average == "norm_mean_norm" else means


def zero_shot_logits(features: Tensor, embeddings: Tensor, scale: float | Tensor) -> Tensor:
    """``scale * f W`` with image features f made unit vectors, in float32.

    Args:
        features: ``(B, D)`` as the image tower gives them.
        embeddings: W, ``(C, D)``, as ``class_embeddings`` gives them.
        scale: 100 for CLIP, whatever its learned scale.
    """
    return scale * F.normalize(features.float(), dim=-1) @ embeddings.float().T


class ZeroShotHead(nn.Module):
    """Fixed class embeddings as a classifier of image features (``zero_shot_logits``).

    Args:
        embeddings: ``(C, D)``.
        prototypes: ``(C, D)``, the same sentences averaged as ``raw_mean``.
        scale: of the cosines.
    """

    embeddings: Tensor
    prototypes: Tensor

    def __init__(self, embeddings: Tensor, prototypes: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("embeddings", embeddings.detach().clone())
        self.register_buffer("prototypes", prototypes.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, D)`` to logits ``(B, C)``."""
        return zero_shot_logits(features, self.embeddings, self.scale)


class ImageConversion(nn.Module):
    """Images normalised for one network to images normalised, and sized, for another.

    Args:
        mean_in: of each channel of the inputs, which were ``(pixel - mean_in) / std_in``.
        std_in: likewise.
        mean_out: of each channel of the outputs; inputs with one channel get as many.
        std_out: likewise.
        size: side of the outputs in pixels; other sizes are resized (bicubic, antialiased).
    """

    def __init__(
        self,
        mean_in: Sequence[float],
        std_in: Sequence[float],
        mean_out: Sequence[float],
        std_out: Sequence[float],
        size: int,
    ) -> None:
        super().__init__()
        self.size = size
        if len(mean_in) not in (1, len(mean_out)):
            raise ValueError(f"images of {len(mean_in)} channels, but {len(mean_out)} are read")
        for name, values in {
            "mean_in": mean_in,
            "std_in": std_in,
            "mean_out": mean_out,
            "std_out": std_out,
        }.items():
            column = torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1)
            # Settings, not weights: they come from the configuration each time.
            self.register_buffer(name, column, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C', size, size)``."""
        pixels = images * self.std_in + self.mean_in
        if pixels.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - self.mean_out) / self.std_out


class VisionLanguageClassifier(nn.Module):
    """An image tower and a head that the text tower made.

    The penultimate vector is the image embedding before the head.

    Args:
        conversion: from the data set's images to the tower's.
        encoder: images to embeddings ``(B, D)``.
        classifier: a ``ZeroShotHead``, or a linear layer that training may change.
    """

    def __init__(
        self, conversion: ImageConversion, encoder: nn.Module, classifier: nn.Module
    ) -> None:
        super().__init__()
        self.conversion, self.encoder, self.classifier = conversion, encoder, classifier

    def forward(self, images: Tensor) -> Tensor:
        """Images as the data set normalises them to logits ``(B, C)``."""
        return self.classifier(self.encode_image(images))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images as the data set normalises them to embeddings ``(B, D)`` in float32."""
        return self.encoder(self.conversion(images)).float()

    def tap_points(self) -> dict[str, str]:
        """The image embedding."""
        return {"penultimate": "input:classifier"}


class ZeroShotClassifier(VisionLanguageClassifier):
    """An image tower and fixed class embeddings.

    Args:
        conversion: from the data set's images to the tower's.
        encoder: images to embeddings ``(B, D)``.
        classifier: the class embeddings.
    """

    def __init__(
        self, conversion: ImageConversion, encoder: nn.Module, classifier: ZeroShotHead
    ) -> None:
        super().__init__(conversion, encoder, classifier)
        self.scale = classifier.scale

    def zero_shot_embeddings(self) -> Tensor:
        """The class embeddings ``(C, D)``."""
        return self.classifier.embeddings

    def prototypes(self) -> Tensor:
        """The class embeddings ``(C, D)`` as ``raw_mean``."""
        return self.classifier.prototypes


def linear_head(embeddings: Tensor) -> nn.Linear:
    """A linear classifier ``(D -> C)`` that begins as the class embeddings, with bias 0."""
    head = nn.Linear(embeddings.shape[1], embeddings.shape[0])
    with torch.no_grad():
        head.weight.copy_(embeddings)
        head.bias.zero_()
    return head
