from __future__ import annotations

import pytest
import torch

from kdrun.layers.generation import prompts_of, sample
from kdrun.models.language import hf_lm

WORDS, END = 11, 10


def network(kind: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    options = {
        "llama": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 1.0},
        "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "initializer_range": 1.0},
    }[kind]
    made = hf_lm(num_classes=WORDS, input_shape=[8], options={"model_type": kind} | options)
    return made.train()


def draw(net: torch.nn.Module, tokens, lengths, **options):
    torch.manual_seed(5)
    settings = {"new_tokens": 6, "num_classes": WORDS} | options
    return sample(net, torch.tensor(tokens), torch.tensor(lengths), **settings)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_cache_changes_nothing(kind: str) -> None:
    """At a temperature near 0, what is drawn is the likeliest token of a whole forward pass."""
    net = network(kind)
    prompts, lengths = [[1, 2, 3, 4], [5, 6, 0, 0]], [4, 2]
    tokens, counted = draw(net, prompts, lengths, temperature=1e-4)
    assert net.training
    net.eval()
    for row, length in enumerate(lengths):
        known = prompts[row][:length]
        for _ in range(6):
            known.append(int(net(torch.tensor([known])).logits[0, -1].argmax()))
        assert tokens[row, : length + 6].tolist() == known
        assert counted[row].tolist() == [False] * length + [True] * 6 + [False] * (4 - length)


def test_a_network_has_positions_for_what_is_wanted_only() -> None:
    """Rows of 5 tokens, four of which are read; the longer prompt is full before the other."""
    wide, narrow = (
        hf_lm(
            num_classes=WORDS,
            input_shape=[4],
            options={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}
            | {"n_positions": room},
        )
        for room in (16, 4)
    )
    positions = "transformer.wpe.weight"
    state = wide.state_dict()
    narrow.load_state_dict(state | {positions: state[positions][:4]})
    prompts, lengths = [[1, 2, 3, 4], [5, 0, 0, 0]], [4, 1]
    expected, _ = draw(wide, prompts, lengths, new_tokens=4)
    found, _ = draw(narrow, prompts, lengths, new_tokens=4, length=5)
    assert torch.equal(found[:, :5], expected[:, :5])


def test_the_same_random_state_gives_the_same_text() -> None:
    net = network("llama")
    first, second = (draw(net, [[1, 2]] * 8, [2] * 8)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) > 1


def test_nothing_counts_after_the_end_token() -> None:
    tokens, counted = draw(network("llama"), [[1]] * 200, [1] * 200, end_token=END)
    ended = 0
    for row, marks in zip(tokens.tolist(), counted.tolist(), strict=True):
        place = row.index(END) if END in row[1:] else 6
        ended += END in row[1:]
        assert marks == [0 < i <= place for i in range(7)]
    assert 0 < ended < 200


def test_only_the_vocabulary_of_the_data_is_drawn() -> None:
    tokens, _ = draw(network("llama"), [[1]] * 50, [1] * 50, num_classes=4)
    assert tokens.max() < 4


def test_prompts_end_where_predictions_begin_to_count() -> None:
    inputs = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    tokens, lengths = prompts_of(inputs, mask, 2)
    # The prediction at position 2 is that of token 3, so three tokens are given.
    assert lengths.tolist() == [3, 2] and torch.equal(tokens, inputs)
    tokens, lengths = prompts_of(inputs, None, 3)
    assert tokens.shape == (2, 3) and lengths.tolist() == [3, 3]
