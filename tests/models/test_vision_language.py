"""Class embeddings, the two towers, CLIP from a folder, and few-shot adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun.errors import UserError
from kdrun.layers.surgery import find_classifier
from kdrun.models.adapters import (
    ClapClassifier,
    TipAdapter,
    constraint,
    multipliers,
    tip_logits,
)
from kdrun.models.clip import clip
from kdrun.models.two_tower import TwoTower
from kdrun.models.vision_language import ImageConversion, class_embeddings, zero_shot_logits

PROMPTS = [["a photo of a cat.", "a cat."], ["a photo of a dog.", "a dog."]]
EMBEDDED = {
    "a photo of a cat.": [3.0, 4.0],
    "a cat.": [0.0, 2.0],
    "a photo of a dog.": [1.0, 0.0],
    "a dog.": [5.0, 0.0],
}


def encode(texts: Any) -> Tensor:
    return torch.tensor([EMBEDDED[text] for text in texts])


def test_the_three_means_differ() -> None:
    assert class_embeddings(encode, PROMPTS, "raw_mean").tolist() == [[1.5, 3.0], [3.0, 0.0]]
    mean = class_embeddings(encode, PROMPTS, "norm_mean")
    torch.testing.assert_close(mean, torch.tensor([[0.3, 0.9], [1.0, 0.0]]))
    unit = class_embeddings(encode, PROMPTS, "norm_mean_norm")
    torch.testing.assert_close(unit, F.normalize(mean, dim=-1))
    assert mean[0].norm() < 1


def test_a_class_without_a_prompt() -> None:
    for prompts in ([["a cat."], []], [["a cat."], [" "]]):
        with pytest.raises(ValueError, match="class 1 has no prompt"):
            class_embeddings(encode, prompts, "raw_mean")


def test_zero_shot_logits_read_directions() -> None:
    w = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    logits = zero_shot_logits(torch.tensor([[7.0, 0.0]]), w, 100)
    assert logits.flatten().tolist() == pytest.approx([60, 0])


def test_images_are_handed_on_in_the_other_normalisation() -> None:
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.5, 0.6, 0.7])
    given = (pixels - 0.1) / 0.25
    convert = ImageConversion([0.1] * 3, [0.25] * 3, mean.tolist(), std.tolist(), 4)
    expected = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(convert(given), expected)
    assert ImageConversion([0.1], [0.25], mean, std, 8)(given[:, :1]).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="images of 2 channels"):
        ImageConversion([0.1] * 2, [0.25] * 2, mean, std, 4)


# -- the small model -------------------------------------------------------------------------------


def two_tower(**options: Any) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(prompts=PROMPTS, input_shape=(1, 8, 8), **options)


def test_words_make_the_classifier() -> None:
    network, images = two_tower(), torch.randn(3, 1, 8, 8)
    text = F.normalize(network.encode_text(["a cat."]), dim=-1)
    torch.testing.assert_close(
        network.encode_text(["a cat.", "a cat."])[1:], network.encode_text(["A CAT"])
    )
    w = network.zero_shot_embeddings()
    expected = 30 * F.normalize(network.encode_image(images), dim=-1) @ w.T
    torch.testing.assert_close(network(images), expected)
    assert w.norm(dim=-1).tolist() == pytest.approx([1, 1]) and text.shape == (1, 32)
    with pytest.raises(ValueError, match="no prompt has the word horse"):
        network.encode_text(["a horse"])


# -- CLIP ------------------------------------------------------------------------------------------


def tiny_clip(folder: Path) -> Path:
    """A CLIP of a few thousand weights with its tokenizer, as ``save_pretrained`` writes it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    special = {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    config = CLIPConfig(
        text_config=tower | special | {"vocab_size": len(words), "max_position_embeddings": 40},
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "whole")


def built(name: Path | str, **options: Any) -> nn.Module:
    scale = {"input_mean": [0.5], "input_std": [0.25]}
    return clip(name=str(name), prompts=PROMPTS, **scale, **options).eval()


@torch.no_grad()
def test_a_clip_from_a_folder_is_the_librarys(folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    network, images = built(folder), torch.rand(3, 1, 16, 16)
    model, tokenizer = (
        CLIPModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows = []
    for texts in PROMPTS:
        parts = []
        for text in texts:
            tokens = tokenizer([text], return_tensors="pt")
            parts.append(F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)[0])
        rows.append(F.normalize(torch.stack(parts).mean(0), dim=-1))
    pixels = network.conversion((images - 0.5) / 0.25)
    features = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    expected = 100 * features @ torch.stack(rows).T
    torch.testing.assert_close(network((images - 0.5) / 0.25), expected, rtol=1e-4, atol=1e-3)


def test_an_architecture_alone_takes_the_weights_later(folder: Path) -> None:
    network, empty = built(folder), built(folder, pretrained=False)
    assert not empty.classifier.embeddings.any()
    empty.load_state_dict(network.state_dict())
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(empty(images), network(images))


def test_a_student_begins_as_its_own_text_classifier(folder: Path) -> None:
    zero_shot = built(folder)
    network = built(folder, head="linear", average="raw_mean")
    path = find_classifier(network)
    linear = network.get_submodule(path)
    torch.testing.assert_close(linear.weight, zero_shot.prototypes())
    assert not linear.bias.any() and linear.weight.requires_grad


def test_what_is_no_whole_clip(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with pytest.raises(UserError, match="no such folder"):
        built(tmp_path / "nowhere")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=1)
    CLIPVisionModel(vision).save_pretrained(tmp_path / "vision")
    with pytest.raises(UserError, match="has no text tower"):
        built(tmp_path / "vision", pretrained=False)
    cut = tiny_clip(tmp_path / "cut")
    weights = load_file(cut / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("text")}
    save_file(kept, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights have no text tower"):
        built(cut)


def test_open_clip_is_asked_for_by_name() -> None:
    pytest.importorskip("kdrun.models.clip")
    try:
        import open_clip  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'kdrun\[clip\]'"):
            built("ViT-B-16", library="open_clip")
    else:
        with pytest.raises(UserError, match="open_clip has no such architecture"):
            built("ViT-B-161", library="open_clip")


# -- adapters --------------------------------------------------------------------------------------


def test_tip_logits_by_hand() -> None:
    f, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    logits = tip_logits(f, zero_shot_logits(f, w, 100), torch.eye(2), torch.eye(2), 1.17, 5.5)
    assert logits.flatten().tolist() == pytest.approx([61.17, 1.17 * math.exp(-5.5)], abs=1e-4)


def test_clap_by_hand() -> None:
    f = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    target = torch.tensor([0, 0, 1])
    probabilities = zero_shot_logits(f, torch.eye(2), 2).softmax(-1)
    found = multipliers(probabilities, target, 3 - 1)
    assert found.tolist() == pytest.approx([0.7397, 0.8808], abs=1e-4)
    wide = F.pad(probabilities, (0, 1))
    assert multipliers(wide, target, 3)[2] == 0


def test_the_constraint_is_zero_at_the_sentences() -> None:
    anchors = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    prototypes = anchors.clone().requires_grad_()
    penalty = constraint(prototypes, anchors, torch.tensor([1.0, 0.5, 0.0]))
    penalty.backward()
    assert penalty == 0 and not prototypes.grad.any()
    moved = anchors + torch.tensor([2.0, 0, 0, 0])
    assert constraint(moved, anchors, torch.tensor([1.0, 0.5, 0.0])).item() == pytest.approx(2.0)


def test_only_what_an_adapter_adds_is_trained() -> None:
    base = two_tower()
    clap = ClapClassifier(base, torch.ones(2))
    assert [name for name, p in clap.named_parameters() if p.requires_grad] == ["prototypes"]
    images = torch.randn(4, 1, 8, 8)
    clap.train()
    assert not clap.base.training
    (clap(images).sum() + clap.constraint()).backward()
    assert clap.prototypes.grad.any()
    keys = F.normalize(torch.randn(3, 32), dim=-1)
    tip = TipAdapter(base, keys, F.one_hot(torch.tensor([0, 1, 1])).float(), strength=0.0)
    assert [name for name, p in tip.named_parameters() if p.requires_grad] == ["keys"]
    torch.testing.assert_close(tip(images), base(images))


def test_a_network_without_class_embeddings_cannot_be_adapted() -> None:
    with pytest.raises(ValueError, match="no class embeddings to adapt"):
        ClapClassifier(nn.Linear(2, 2), torch.ones(2))
