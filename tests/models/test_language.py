from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from kdrun.catalogue import shipped
from kdrun.errors import UserError
from kdrun.models import build_model
from kdrun.models.language import hf_lm

TINY = {
    "llama": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "phi3": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
}


def tiny(kind: str = "llama", words: int = 11, length: int = 6, **options):
    arguments = {key: options.pop(key) for key in ("name", "pretrained") if key in options}
    arguments |= {"resize_vocabulary": options.pop("resize_vocabulary", False)}
    return hf_lm(
        num_classes=words,
        input_shape=[length],
        options={"model_type": kind} | TINY[kind] | options,
        **arguments,
    )


@pytest.mark.parametrize("kind", TINY)
def test_new_networks_take_the_vocabulary_of_the_data(kind: str) -> None:
    network = tiny(kind).eval()
    tokens = torch.randint(11, (2, 6))
    output = network(tokens)
    assert output.logits.shape == (2, 6, 11) and output.past_key_values is None
    # Causal: what comes later changes nothing before it.
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    torch.testing.assert_close(network(changed).logits[:, :4], output.logits[:, :4])


@pytest.mark.parametrize("name", ["gpt2_nano", "gpt2_mini", "llama_nano", "llama_mini"])
def test_shipped_networks(name: str) -> None:
    node = yaml.safe_load((shipped() / "model" / f"{name}.yaml").read_text())
    with torch.device("meta"):
        network = build_model(node, num_classes=257, input_shape=(64,))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert (1e4 if "nano" in name else 5e5) < count < (5e5 if "nano" in name else 5e6)


def test_a_saved_network_comes_back(tmp_path: Path) -> None:
    network = tiny()
    network.save_pretrained(tmp_path / "saved")
    again = hf_lm(name=str(tmp_path / "saved"), pretrained=True, num_classes=11, input_shape=[6])
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    fresh = hf_lm(name=str(tmp_path / "saved"), num_classes=11, input_shape=[6])
    head = network.state_dict()["lm_head.weight"]
    assert not torch.equal(fresh.state_dict()["lm_head.weight"], head)


def test_a_vocabulary_is_resized_only_when_asked(tmp_path: Path) -> None:
    tiny(words=11).save_pretrained(tmp_path / "saved")
    saved = {"name": str(tmp_path / "saved"), "pretrained": True, "input_shape": [6]}
    with pytest.raises(UserError, match=r"vocabulary of 11, but the data set's tokenizer has 20"):
        hf_lm(num_classes=20, **saved)
    resized = hf_lm(num_classes=20, resize_vocabulary=True, **saved)
    assert resized(torch.tensor([[19]])).logits.shape == (1, 1, 20)
    # A few spare rows are usual; the task cuts their logits.
    assert hf_lm(num_classes=9, **saved)(torch.tensor([[0]])).logits.shape == (1, 1, 11)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has 32 positions, but rows have 64: lower dataset.length"
    ):
        tiny(length=64)
    with pytest.raises(UserError, match=r"there is no model in that folder \(no config.json\)"):
        hf_lm(name=str(tmp_path), pretrained=True, num_classes=5, input_shape=[4])
    with pytest.raises(UserError, match="no option hiden_size; hidden_size?"):
        tiny(hiden_size=4)
    with pytest.raises(UserError, match="give name"):
        hf_lm(num_classes=5, input_shape=[4])
    with pytest.raises(UserError, match=r"reads rows of tokens, but a sample here has shape"):
        hf_lm(num_classes=5, input_shape=[3, 8, 8], options={"model_type": "llama"})
    with pytest.raises(UserError, match="cannot be built"):
        tiny(num_attention_heads=3)
    with pytest.raises(UserError, match=r"vocabulary of 50257, but .* has 257"):
        tiny("gpt2", words=257, vocab_size=50257)
