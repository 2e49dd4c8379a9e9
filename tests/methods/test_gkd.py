from __future__ import annotations

import copy

import pytest
import torch

from kdrun.methods.gkd import GKD
from kdrun.models.language import hf_lm
from kdrun.outputs import Batch, ModelOutput, Progress, next_token_batch

WORDS = 11
NOW = Progress(0, 1, 0, 1)


def writer() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    options = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
    return hf_lm(num_classes=WORDS, input_shape=[6], options=options | sizes)


def ready(**options) -> tuple[GKD, torch.nn.Module]:
    method, network = GKD(new_tokens=3, prompt_tokens=2, **options), writer()
    assert method.wrap(network, {}, text().inputs[:2]) is network
    method.setup(ModelOutput(torch.zeros(2, 6, WORDS)), {})
    return method, network


def text() -> Batch:
    tokens = torch.randint(WORDS, (4, 7), generator=torch.Generator().manual_seed(1))
    return next_token_batch(tokens, None, torch.arange(4))


def test_prompts_are_kept_and_responses_written() -> None:
    method, _ = ready(on_policy=1.0)
    batch = text()
    written = method.augment(batch)
    assert written.inputs.shape == (4, 4) and torch.equal(written.index, batch.index)
    assert torch.equal(written.inputs[:, :2], batch.inputs[:, :2])
    assert torch.equal(written.inputs[:, 1:], written.target[:, :-1])
    # Only what the student wrote counts: predictions 1, 2 and 3 give tokens 2, 3 and 4.
    assert written.mask.tolist() == [[False, True, True, True]] * 4


def test_lambda_is_the_share_of_batches_that_the_student_writes() -> None:
    method, _ = ready(on_policy=0.3)
    batch, shares = text(), []
    torch.manual_seed(0)
    for _ in range(200):
        same = method.augment(batch) is batch
        shares.append(float(method.take_recorded()["gkd_on_policy"]))
        assert same is (shares[-1] == 0)
    assert 0.2 < sum(shares) / 200 < 0.4
    assert ready(on_policy=0.0)[0].augment(batch) is batch


def test_sampling_continues_from_a_saved_random_state() -> None:
    method, _ = ready(on_policy=0.5)
    batch = text()
    torch.manual_seed(3)
    method.augment(batch)
    state = torch.get_rng_state()
    first = [method.augment(batch).inputs for _ in range(5)]
    torch.set_rng_state(state)
    again = [method.augment(batch).inputs for _ in range(5)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_student_is_no_part_of_the_method() -> None:
    method, network = ready()
    assert not list(method.parameters()) and not method.state_dict()
    copy.deepcopy(network)


def test_an_end_outside_the_vocabulary_is_refused() -> None:
    ready(end_token=WORDS - 1)
    with pytest.raises(ValueError, match="end_token=11: the vocabulary has 11 tokens"):
        ready(end_token=WORDS)


def test_networks_must_have_room_for_what_is_written() -> None:
    options = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
    short = hf_lm(num_classes=WORDS, input_shape=[6], options=options)
    tokens = text().inputs[:2]
    GKD(new_tokens=4, prompt_tokens=2).wrap(writer(), {"teacher": short}, tokens)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot read the 7 tokens that prompt_"):
        GKD(new_tokens=5, prompt_tokens=2).wrap(writer(), {"teacher": short}, tokens)
    GKD(new_tokens=5, prompt_tokens=2, on_policy=0.0).wrap(writer(), {"teacher": short}, tokens)


def test_what_long_prompts_leave_no_room_for_is_cut() -> None:
    options = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
    torch.manual_seed(0)
    network = hf_lm(num_classes=WORDS, input_shape=[6], options=options)
    method, batch = GKD(new_tokens=3, prompt_tokens=2, on_policy=1.0), text()
    method.wrap(network, {}, batch.inputs[:2])
    method.setup(ModelOutput(torch.zeros(2, 6, WORDS)), {})
    # Prompts of 5 and of 2 tokens, in rows of 6.
    batch.mask = torch.arange(6).expand(4, 6) >= torch.tensor([4, 1, 1, 4])[:, None]
    written = method.augment(batch)
    assert network(written.inputs).logits.shape == (4, 6, WORDS)
    assert written.mask.sum(1).tolist() == [2, 3, 3, 2]
    assert torch.equal(written.inputs[0, :5], batch.inputs[0, :5])


def test_imitation_is_forward_kl_on_what_the_student_wrote() -> None:
    method, network = ready(on_policy=1.0, divergence="forward_kl")
    batch = method.augment(text())
    student = ModelOutput(network(batch.inputs).logits)
    torch.manual_seed(9)
    teacher = ModelOutput(torch.randn(4, 4, WORDS))
    loss = method.losses(student, {"teacher": teacher}, batch, NOW)["divergence"]
    log_q, log_p = student.logits.log_softmax(-1), teacher.logits.log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(loss, each[:, 1:].mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_training_on_its_own_text_brings_the_student_to_the_teacher() -> None:
    method, student = ready(on_policy=1.0)
    torch.manual_seed(7)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    losses = []
    for _ in range(40):
        batch = method.augment(text())
        with torch.no_grad():
            theirs = ModelOutput(teacher(batch.inputs).logits)
        ours = ModelOutput(student(batch.inputs).logits)
        loss = method.losses(ours, {"teacher": theirs}, batch, NOW)["divergence"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
