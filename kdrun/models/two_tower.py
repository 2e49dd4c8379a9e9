"""A small two-tower image-text model: a stand-in for CLIP that learns in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdrun.models.vision_language import class_embeddings, zero_shot_logits
from kdrun.parameters import Positive, PositiveInt


class TwoTower(nn.Module):
    """An image tower and a text tower, used as a zero-shot classifier of its prompts.

    The image tower is a perceptron of the pixels; the text tower averages word embeddings and
    passes them through a perceptron. Both end in ``width`` numbers. Logits are ``scale`` times the
    cosine between an image and the mean of each class's sentences; so cross-entropy on captions
    trains both towers, and afterwards the words alone make the classifier.

    Args:
        prompts: sentences of each class, which also make up the vocabulary; null: the data set's.
        input_shape: shape of one image; null: the data set's.
        width: of the common space.
        hidden: width of the hidden layer of either tower.
        scale: of the cosines; 100, as in CLIP, saturates so small a model.
    """

    def __init__(
        self,
        *,
        prompts: list,
        input_shape: Sequence[PositiveInt],
        width: PositiveInt = 32,
        hidden: PositiveInt = 64,
        scale: Positive = 30.0,
    ) -> None:
        super().__init__()
        self.prompts, self.scale = prompts, scale
        words = sorted({word for texts in prompts for text in texts for word in _words(text)})
        self.vocabulary = {word: number for number, word in enumerate(words)}
        self.words = nn.EmbeddingBag(len(words), hidden, mode="mean")
        self.text_tower = _perceptron(hidden, hidden, width)
        self.image_tower = nn.Sequential(
            nn.Flatten(), *_perceptron(math.prod(input_shape), hidden, width)
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to embeddings ``(B, D)``."""
        return self.image_tower(images)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences to embeddings ``(N, D)``.

        Raises:
            ValueError: a word that no prompt has.
        """
        sentences = [_words(text) for text in texts]
        unknown = {word for sentence in sentences for word in sentence} - set(self.vocabulary)
        if unknown:
            raise ValueError(f"no prompt has the word {min(unknown)}")
        ids = [self.vocabulary[word] for sentence in sentences for word in sentence]
        lengths = torch.tensor([len(sentence) for sentence in sentences])
        device = self.words.weight.device
        first = (lengths.cumsum(0) - lengths).to(device)
        return self.text_tower(self.words(torch.tensor(ids, device=device), first))

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits ``(B, C)``, one for each class that has prompts."""
        return zero_shot_logits(self.encode_image(images), self.zero_shot_embeddings(), self.scale)

    def zero_shot_embeddings(self) -> Tensor:
        """The class embeddings ``(C, D)``, unit vectors."""
        return class_embeddings(self.encode_text, self.prompts, "norm_mean_norm")

    def prototypes(self) -> Tensor:
        """The class embeddings ``(C, D)`` as the mean over sentences as they are."""
        return class_embeddings(self.encode_text, self.prompts, "raw_mean")

    def tap_points(self) -> dict[str, str]:
        """The image embedding."""
        return {"penultimate": "image_tower"}


def _words(text: str) -> list[str]:
    return text.lower().replace(".", " ").replace(",", " ").split()


def _perceptron(width_in: int, hidden: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, width))
