from __future__ import annotations

import torch

from kdrun.methods.seqkd import SeqKD
from kdrun.outputs import Batch, ModelOutput, Progress


def test_the_loss_is_the_tasks_own_on_whatever_the_batch_holds() -> None:
    method = SeqKD()
    method.supervised_loss = lambda output, batch: output.logits.sum() + batch.target.sum()
    tokens = torch.ones(2, 3, dtype=torch.long)
    batch = Batch(tokens, tokens, torch.arange(2))
    terms = method.losses(ModelOutput(torch.zeros(2, 3, 5)), {}, batch, Progress(0, 1, 0, 1))
    assert {name: value.item() for name, value in terms.items()} == {"sequence": 6.0}


def test_the_teacher_is_trained_but_not_run_in_the_steps() -> None:
    assert SeqKD().roles() == {"teacher": "teacher"} and SeqKD.offline
