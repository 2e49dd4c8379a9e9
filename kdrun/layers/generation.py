"""Sampling from causal language models token by token, with their key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def sample(
    network: nn.Module,
    tokens: Tensor,
    lengths: Tensor,
    *,
    new_tokens: int,
    num_classes: int,
    temperature: float = 1.0,
    end_token: int | None = None,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue prompts by tokens drawn from the network's own distribution.

    The network is run in evaluation mode (no dropout), and put back into its own. Random numbers
    come from the default generator, which checkpoints carry, one draw for every row and token
    whatever ends early, so the same state gives the same text.

    Args:
        network: a causal model of transformers.
        tokens: ``(B, P)`` prompts, filled up on the right.
        lengths: ``(B,)`` tokens of each prompt, at least 1.
        new_tokens: largest number of tokens to draw.
        num_classes: only the first so many ids are drawn.
        temperature: of the distribution drawn from.
        end_token: nothing counts after it; None: every row goes on to the end.
        length: tokens of a row that are wanted; the network need not have positions for more, and
            what is drawn beyond means nothing. None: all of them.

    Returns:
        ``(B, P + new_tokens)`` prompts with what follows each, filled up on the right, and of the
        same shape, which tokens were drawn; the end token is one of them.
    """
    was_training = network.training
    network.eval()
    try:
        drawn, counted = _draw(
            network, tokens, lengths, new_tokens, num_classes, temperature, end_token, length
        )
    finally:
        network.train(was_training)
    # Put each row's continuation where its prompt ends.
    place = lengths[:, None] + torch.arange(new_tokens, device=tokens.device)
    filled = torch.cat([tokens, torch.zeros_like(drawn)], dim=1)
    marks = torch.zeros_like(filled, dtype=torch.bool)
    return filled.scatter(1, place, drawn), marks.scatter(1, place, counted)


def _draw(
    network: nn.Module,
    tokens: Tensor,
    lengths: Tensor,
    new_tokens: int,
    num_classes: int,
    temperature: float,
    end_token: int | None,
    length: int | None,
) -> tuple[Tensor, Tensor]:
    """The continuations ``(B, new_tokens)``, and which of their tokens count."""
    size = tokens.shape[1]
    # Prompts end together, so that one step continues them all; what fills the left is masked out.
    order = torch.arange(size, device=tokens.device) - (size - lengths[:, None])
    attention = order >= 0
    inputs = tokens.gather(1, order.clamp(min=0))
    positions = order.clamp(min=0)
    cache, finished = None, torch.zeros_like(lengths, dtype=torch.bool)
    drawn, counted = [], []
    for _ in range(new_tokens):
        output = network(
            input_ids=inputs,
            attention_mask=attention.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits = output.logits[:, -1, :num_classes].float() / temperature
        inputs = torch.multinomial(logits.softmax(-1), 1)
        drawn.append(inputs)
        counted.append(~finished[:, None])
        if end_token is not None:
            finished = finished | (inputs[:, 0] == end_token)
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
        if length is not None:  # The last token that is wanted follows on the one before it.
            positions = positions.clamp(max=length - 2)
    return torch.cat(drawn, dim=1), torch.cat(counted, dim=1)


def prompts_of(inputs: Tensor, mask: Tensor | None, prompt_tokens: int) -> tuple[Tensor, Tensor]:
    """What a model is given before it continues: the tokens before the first one that counts.

    Args:
        inputs: ``(B, L)`` token ids.
        mask: ``(B, L)``, true where the prediction counts; None, or true from the start: the prompt
            is the first ``prompt_tokens``.
        prompt_tokens: see ``mask``.

    Returns:
        ``(B, P)`` ids and ``(B,)`` lengths, each at least 1.
    """
    given = min(prompt_tokens, inputs.shape[1])
    if mask is None:
        return inputs[:, :given], inputs.new_full((len(inputs),), given)
    # The prediction at position i is that of token i + 1.
    first = mask.int().argmax(dim=1) + 1
    lengths = torch.where(mask[:, 0], first.new_tensor(given), first)
    return inputs, lengths.clamp(max=inputs.shape[1])
