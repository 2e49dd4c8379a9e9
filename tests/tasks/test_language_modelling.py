from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from kdrun.models.language import hf_lm
from kdrun.outputs import Batch, ModelOutput
from kdrun.tasks.language_modelling import LanguageModelling

WORDS = 5


def batch_of(samples: int = 3, length: int = 4, mask: torch.Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(WORDS, (samples, length + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(samples), mask)


def logits_for(batch: Batch) -> torch.Tensor:
    return torch.randn(*batch.inputs.shape, WORDS, generator=torch.Generator().manual_seed(1))


def judged(task: LanguageModelling, *pairs: tuple[torch.Tensor, Batch]) -> dict[str, float]:
    metrics = task.metrics()
    for logits, batch in pairs:
        task.update_metrics(metrics, ModelOutput(logits), batch)
    return task.compute(metrics)


def test_metrics_are_means_over_the_tokens_that_count() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    batch = batch_of(mask=mask)
    logits = logits_for(batch)
    losses, hits = [], []
    for row, place in mask.nonzero().tolist():
        wanted = int(batch.target[row, place])
        losses.append(-float(logits[row, place].log_softmax(-1)[wanted]))
        hits.append(int(logits[row, place].argmax()) == wanted)
    mean = sum(losses) / 7
    task = LanguageModelling(num_classes=WORDS, bytes_per_token=2.0)
    found = judged(task, (logits[:1], batch.rows(slice(1))), (logits[1:], batch.rows(slice(1, 3))))
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["accuracy"] == pytest.approx(100 * sum(hits) / 7)
    assert found["bits_per_byte"] == pytest.approx(mean / math.log(2) / 2, rel=1e-5)
    assert task.supervised_loss(ModelOutput(logits), batch).item() == pytest.approx(mean, rel=1e-5)


def test_without_text_there_are_no_bits_per_byte() -> None:
    batch = batch_of()
    task = LanguageModelling(num_classes=WORDS)
    assert set(judged(task, (logits_for(batch), batch))) == {"loss", "perplexity", "accuracy"}


def test_nothing_counts_nothing_is_lost() -> None:
    batch = batch_of(mask=torch.zeros(3, 4, dtype=torch.bool))
    logits = logits_for(batch).requires_grad_()
    loss = LanguageModelling(num_classes=WORDS).supervised_loss(ModelOutput(logits), batch)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_spare_rows_of_a_vocabulary_are_cut() -> None:
    batch = batch_of()
    logits = torch.randn(3, 4, WORDS + 3)
    task = LanguageModelling(num_classes=WORDS)
    output = task.forward(lambda tokens: SimpleNamespace(logits=logits), batch)
    assert torch.equal(output.logits, logits[..., :WORDS])


def test_guessing_is_told_from_knowing() -> None:
    guess, margin = LanguageModelling(num_classes=100).chance()
    assert guess == pytest.approx(math.log(100)) and 0 < margin < guess


# -- large vocabularies ---------------------------------------------------------------------------


def tiny_network(**options):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    options = {"model_type": "gpt2", "attn_pdrop": 0.0} | sizes | options
    return hf_lm(num_classes=WORDS + 2, input_shape=[4], options=options)


@pytest.mark.parametrize("masked", [False, True])
def test_a_chunk_of_logits_at_a_time_is_the_same_training(masked: bool) -> None:
    torch.manual_seed(0)
    network = tiny_network()
    mask = torch.rand(3, 4) > 0.4 if masked else None
    batch = batch_of(mask=mask)
    found = {}
    for chunk in (None, 5):
        task = LanguageModelling(num_classes=WORDS, chunk=chunk)
        output = task.forward(network, batch)
        assert tuple(output.logits.shape) == (3, 4, WORDS)
        loss = task.supervised_loss(output, batch)
        network.zero_grad()
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in network.parameters()]
        metrics = task.metrics()
        task.update_metrics(metrics, output, batch)
        found[chunk] = (loss, gradients, task.compute(metrics))
    torch.testing.assert_close(found[5][0], found[None][0])
    torch.testing.assert_close(found[5][1], found[None][1])
    assert found[5][2] == pytest.approx(found[None][2], rel=1e-5)


def test_a_network_that_does_more_to_its_logits_is_refused() -> None:
    network = tiny_network()
    whole = network.forward
    network.forward = lambda tokens: SimpleNamespace(logits=torch.tanh(whole(tokens).logits) + 1)
    with pytest.raises(ValueError, match="its logits are not its last layer's alone"):
        LanguageModelling(num_classes=WORDS, chunk=5).forward(network, batch_of())


class Below(torch.nn.Embedding):
    def forward(self, tokens):
        return SimpleNamespace(last_hidden_state=super().forward(tokens))


class Capped(torch.nn.Module):
    """Its logits are capped, which the small ones of a new network hardly show."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model, self.head = Below(WORDS, 4), torch.nn.Linear(4, WORDS)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, tokens):
        logits = self.head(self.base_model(tokens).last_hidden_state)
        return SimpleNamespace(logits=30 * torch.tanh(logits / 30))


def test_a_cap_is_seen_before_logits_are_large() -> None:
    with pytest.raises(ValueError, match="its logits are not its last layer's alone"):
        LanguageModelling(num_classes=WORDS, chunk=5).forward(Capped(), batch_of())


def test_a_network_that_does_not_tell_its_last_layer_is_refused() -> None:
    network = torch.nn.Embedding(WORDS, WORDS)
    with pytest.raises(ValueError, match=r"does not tell its last layer; set task.chunk=null"):
        LanguageModelling(num_classes=WORDS, chunk=5).forward(network, batch_of())
