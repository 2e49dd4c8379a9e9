"""CLIP of transformers or open_clip as an image classifier whose classes are sentences.

Nothing is fetched unless ``pretrained`` asks for it and ``name`` is no folder of this machine. The
text tower is run once, when the network is built; what is kept is the image tower and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdrun.errors import UserError
from kdrun.models.external import hf_normalisation
from kdrun.models.vision_language import (
    Average,
    ImageConversion,
    Prompts,
    VisionLanguageClassifier,
    ZeroShotClassifier,
    ZeroShotHead,
    class_embeddings,
    linear_head,
)
from kdrun.parameters import Positive

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel


Normalisation = tuple[Sequence[float], Sequence[float]]
OPENAI: Normalisation = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
"""Of the first CLIP, and of all that say nothing else."""


class Towers(NamedTuple):
    """What a library gives.

    Attributes:
        image: images to embeddings ``(B, D)``.
        size: side of the images in pixels.
        width: D.
        text: sentences to embeddings ``(N, D)``; None without weights.
        normalisation: mean and standard deviation of the images that the weights were made with.
    """

    image: nn.Module
    size: int
    width: int
    text: Any
    normalisation: Normalisation


def clip(
    *,
    name: str,
    library: Literal["transformers", "open_clip"] = "transformers",
    tag: str | None = None,
    pretrained: bool = True,
    head: Literal["zero_shot", "linear"] = "zero_shot",
    average: Literal["norm_mean_norm", "norm_mean", "raw_mean"] = "norm_mean_norm",
    scale: Positive = 100.0,
    prompts: list,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    input_mean: list[float],
    input_std: list[float],
) -> VisionLanguageClassifier:
    """A CLIP as a classifier of the data set's classes.

    Args:
        name: a folder written by ``save_pretrained`` or a name on the hub; with ``open_clip`` the
            name of an architecture, such as ``ViT-H-14-378-quickgelu``.
        library: ``transformers`` or ``open_clip``.
        tag: of ``open_clip``: which weights (``dfn5b``), or a file of them.
        pretrained: load the weights; otherwise only the architecture is built.
        head: ``zero_shot``: fixed class embeddings. ``linear``: a layer that begins as them and is
            trained with the image tower, for students.
        average: of the sentences of a class; see ``class_embeddings``.
        scale: of the cosines of the zero-shot head.
        prompts: sentences of each class; null: the data set's.
        mean: of each channel of the images that it reads, in [0, 1]; null: what the weights were
            made with.
        std: likewise.
        input_mean: the same of the images that it is given; null: the data set's.
        input_std: likewise.

    Raises:
        UserError: no such model, one without a text tower, or files that cannot be fetched.
    """
    if library == "transformers":
        towers = _of_transformers(name, pretrained)
    else:
        towers = _of_open_clip(name, tag, pretrained)
    made_with = towers.normalisation
    converted = (mean or made_with[0], std or made_with[1])
    conversion = ImageConversion(input_mean, input_std, *converted, towers.size)
    embeddings = _embedded(towers, prompts, average)
    if head == "linear":
        network = VisionLanguageClassifier(conversion, towers.image, linear_head(embeddings))
    else:
        zero_shot = ZeroShotHead(embeddings, _embedded(towers, prompts, "raw_mean"), scale)
        network = ZeroShotClassifier(conversion, towers.image, zero_shot)
    network.input_normalisation, network.converted_normalisation = made_with, converted
    return network


@torch.no_grad()
def _embedded(towers: Towers, prompts: Prompts, average: Average) -> Tensor:
    """The class embeddings ``(C, D)``; zeros where weights that bring them are still to come."""
    if towers.text is None:
        return torch.zeros(len(prompts), towers.width)
    return class_embeddings(towers.text, prompts, average)


class TransformersImageTower(nn.Module):
    """The vision model of a transformers CLIP with its projection into the common space."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to embeddings ``(B, D)``."""
        return self.visual_projection(self.vision_model(pixel_values=images).pooler_output)


def _of_transformers(name: str, pretrained: bool) -> Towers:
    from transformers import AutoTokenizer, CLIPModel

    config = _configuration(name)
    if pretrained:
        model, told = _loaded(
            name, lambda: CLIPModel.from_pretrained(name, output_loading_info=True)
        )
        lacking = sorted(told["missing_keys"])
        if lacking:
            tower = "text tower" if "text" in lacking[0] else "tensor"
            raise UserError(f"clip {name}: its weights have no {tower} ({lacking[0]} is missing)")
    else:
        model = CLIPModel(config)
    image, size = TransformersImageTower(model), config.vision_config.image_size
    width, normalisation = config.projection_dim, hf_normalisation(name) or OPENAI
    if not pretrained:
        return Towers(image, size, width, None, normalisation)
    tokenizer = _loaded(name, lambda: AutoTokenizer.from_pretrained(name))
    model.eval()

    def encode_text(texts: Sequence[str]) -> Tensor:
        length = config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output

    return Towers(image, size, width, encode_text, normalisation)


def _configuration(name: str) -> CLIPConfig:
    from transformers import AutoConfig, CLIPConfig

    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"clip name={name}: no such folder")
    config = _loaded(name, lambda: AutoConfig.from_pretrained(name))
    if not isinstance(config, CLIPConfig):
        raise UserError(
            f"clip {name}: is a {config.model_type}, which has no text tower; give a whole CLIP"
        )
    return config


def _loaded(name: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"clip {name}: its files cannot be fetched or read ({reason})") from error


def _of_open_clip(name: str, tag: str | None, pretrained: bool) -> Towers:
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            "library=open_clip needs open_clip, which is not installed: pip install 'kdrun[clip]'"
        ) from error
    if name not in open_clip.list_models():
        raise UserError(f"clip name={name}: open_clip has no such architecture")
    if pretrained and tag is None:
        raise UserError(
            f"clip {name}: give tag=<weights of open_clip, or a file>, or pretrained=false"
        )
    try:
        model, _, _ = open_clip.create_model_and_transforms(
            name, pretrained=tag if pretrained else None
        )
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"clip {name}: its weights cannot be fetched or read ({reason})") from error
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    model.eval()

    def encode_text(texts: Sequence[str]) -> Tensor:
        return model.encode_text(open_clip.get_tokenizer(name)(list(texts)))

    width = open_clip.get_model_config(name)["embed_dim"]
    made = {} if tag is None else open_clip.get_pretrained_cfg(name, tag)
    normalisation = (made.get("mean", OPENAI[0]), made.get("std", OPENAI[1]))
    return Towers(model.visual, size, width, encode_text if pretrained else None, normalisation)
