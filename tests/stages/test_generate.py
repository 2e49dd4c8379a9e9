"""Text that the teacher writes: what names it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kdrun import distributed
from kdrun.outputs import Batch
from kdrun.stages import generate
from kdrun.stages.generate import GenerateText
from kdrun.store import Artefact


def name_of(**changed: int) -> dict:
    settings = {"seed": 0, "batch_size": 8, "weights": "last"} | changed
    config = {
        "teacher": {"seed": settings["seed"], "weights": settings["weights"]},
        "training": {"batch_size": settings["batch_size"]},
    }
    context = SimpleNamespace(
        config=config,
        artefacts={"teacher": Artefact(Path("network", "0123"), {})},
        data=SimpleNamespace(fingerprint="4567"),
        limit_batches=None,
    )
    return GenerateText().key(context)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 16}, {"weights": "best"}])
def test_whatever_changes_the_text_names_it(changed: dict) -> None:
    """All rows of a batch are drawn together, so another batch size is another text."""
    assert name_of(**changed) != name_of() == name_of()


class Uniform(nn.Module):
    """Every token is as likely as any other."""

    def forward(self, *, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50), past_key_values=None)


class Prompts:
    """Three batches of four rows."""

    def __len__(self) -> int:
        return 3

    def replay(self, epoch: int, position: int) -> Batch:
        return Batch(torch.full((4, 8), position), torch.zeros(4, 8), torch.arange(4))


def test_the_text_is_the_same_on_however_many_ranks(monkeypatch) -> None:
    context = SimpleNamespace(
        config={
            "trainer": {"accelerator": "cpu"},
            "training": {"batch_size": 4},
            "teacher": {"seed": 3},
        },
        data=SimpleNamespace(
            train=lambda **_: Prompts(),
            input_shape=(8,),
            num_classes=50,
            tokenizer=SimpleNamespace(end=None),
        ),
        watch=SimpleNamespace(raise_if_received=lambda: None),
        limit_batches=None,
    )
    monkeypatch.setattr(generate, "load_network", lambda *_: Uniform())
    stage = GenerateText(prompt_tokens=2)
    alone = stage._continued(context, "text")
    rows = torch.cat([tokens for tokens, _ in alone.values()])
    assert rows.shape == (12, 9) and len(rows[:, 2:].unique(dim=0)) == 12
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    together = {}
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        together |= stage._continued(context, "text")
    assert together.keys() == alone.keys() == {0, 1, 2}
    for number, (tokens, counted) in alone.items():
        assert torch.equal(together[number][0], tokens)
        assert torch.equal(together[number][1], counted)
