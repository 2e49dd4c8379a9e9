"""GKD: on-policy distillation of language models (Agarwal et al.; ICLR 2024).

Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem; arXiv 2306.13649. A student trained on
given text never sees its own mistakes. GKD lets it write: with probability ``on_policy`` (lambda)
the responses of a batch are replaced by samples of the student, and the teacher judges those, token
by token, by a generalised Jensen-Shannon divergence:

    L = mean of  beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

over the tokens of the responses. beta is the teacher's weight, as in TRL. No gradient flows through
the sampling, dropout is off in it, and its temperature is not used in the loss. Nothing counts
after the end token, which itself does. ImitKD (Lin et al., EMNLP 2020) is ``on_policy=1
divergence=forward_kl``. Every sample is learned from once; the scripts of DistiLLM, whose GKD has
beta 0.1, draw from a buffer of the last 1,000 instead. The student is given what comes before the
first token that counts, or the first ``prompt_tokens`` where all of a row counts. What it writes
beyond the positions of the networks is cut.

One draw decides for a whole batch; draws and samples come from the random state that checkpoints
carry, so a continued run goes on with the same text. ``gkd_on_policy`` is the share of batches that
the student wrote. Models of transformers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrun.layers.generation import prompts_of, sample
from kdrun.methods.divergence import Divergence
from kdrun.outputs import Batch, ModelOutput, next_token_batch
from kdrun.parameters import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt


class GKD(Divergence):
    """Let the student write, and match the teacher on what it wrote.

    Args:
        on_policy: probability that a batch is written by the student.
        divergence: what is matched; see ``Divergence``.
        beta: weight of the teacher in the mixture of ``jsd``.
        skew: share of the other distribution in the mixture of the skewed ones.
        sampling_temperature: of the distribution that is drawn from.
        new_tokens: largest number of tokens that the student writes.
        prompt_tokens: given of a row where all of it counts.
        end_token: id after which nothing counts; None: rows go on to the end.
        weight: factor of the divergence.
        supervised_weight: factor of the task's own loss, on whatever the batch holds.
    """

    tasks = ("language_modelling",)
    ordered = True

    def __init__(
        self,
        *,
        on_policy: Fraction = 0.5,
        divergence: Literal[
            "jsd", "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "tvd"
        ] = "jsd",
        beta: Fraction = 0.5,
        skew: Fraction = 0.1,
        sampling_temperature: Positive = 0.9,
        new_tokens: PositiveInt = 128,
        prompt_tokens: PositiveInt = 16,
        end_token: NonNegativeInt | None = None,
        weight: NonNegative = 1.0,
        supervised_weight: NonNegative = 0.0,
    ) -> None:
        super().__init__(
            divergence=divergence,
            beta=beta,
            skew=skew,
            weight=weight,
            supervised_weight=supervised_weight,
        )
        self.on_policy = on_policy
        self.sampling_temperature = sampling_temperature
        self.new_tokens, self.prompt_tokens = new_tokens, prompt_tokens
        self.end_token = end_token
        self.num_classes = 0

    def wrap(self, student: nn.Module, teachers: Mapping[str, nn.Module], sample: Any) -> nn.Module:
        """The student as it is; it is remembered, since it writes.

        Raises:
            ValueError: a network cannot read the shortest of what will be written.
        """
        size = min(self.prompt_tokens, sample.shape[1]) + self.new_tokens
        networks = (student, *teachers.values())
        for network in networks if self.on_policy else ():
            _refuse_shorter(network, sample.new_zeros(1, size))
        rooms = [room for room in map(_positions, networks) if room is not None]
        # The last token that is written is predicted, not read.
        self._longest = min(rooms) + 1 if rooms else None
        # In a plain tuple: as an attribute it would become part of this module and its checkpoints.
        self._writer = (student,)
        return student

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """The vocabulary that may be drawn from is that of the logits.

        Raises:
            ValueError: the end token is none of it.
        """
        self.num_classes = student.logits.shape[-1]
        if self.end_token is not None and self.end_token >= self.num_classes:
            raise ValueError(
                f"end_token={self.end_token}: the vocabulary has {self.num_classes} tokens"
            )

    def augment(self, batch: Batch) -> Batch:
        """With probability ``on_policy``, the batch with responses of the student."""
        writes = bool(torch.rand(()) < self.on_policy)
        self.record("gkd_on_policy", torch.tensor(float(writes), device=batch.index.device))
        return self.written(batch) if writes else batch

    def written(self, batch: Batch) -> Batch:
        """The prompts of a batch, continued by the student."""
        prompts, lengths = prompts_of(batch.inputs, batch.mask, self.prompt_tokens)
        tokens, counted = sample(
            self._writer[0],
            prompts,
            lengths,
            new_tokens=self.new_tokens,
            num_classes=self.num_classes,
            temperature=self.sampling_temperature,
            end_token=self.end_token,
            length=self._longest,
        )
        kept = slice(self._longest)
        return next_token_batch(tokens[:, kept], counted[:, kept], batch.index)


def _positions(network: nn.Module) -> int | None:
    """Tokens that a network has positions for, where the configuration of transformers says so."""
    return getattr(getattr(network, "config", None), "max_position_embeddings", None)


@torch.no_grad()
def _refuse_shorter(network: nn.Module, tokens: Tensor) -> None:
    try:
        network(tokens)
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{type(network).__name__} cannot read the {tokens.shape[1]} tokens that prompt_tokens "
            "and new_tokens make: lower them or choose another network"
        ) from error
