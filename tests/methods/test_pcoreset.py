"""What PCoreSet chooses by, and that each strategy is the one that it is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdrun.method import Acquisition
from kdrun.methods.pcoreset import PCoreSet
from kdrun.outputs import ModelOutput
from kdrun.selection.strategies import badge, feature_coreset, most_uncertain

LABELLED = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
POOL = torch.tensor([[0.9, 0.1, 0], [0.1, 0.8, 0.1], [0, 0.1, 0.9], [0.34, 0.33, 0.33]])
TARGET = torch.tensor([0, 0])


class Given(PCoreSet):
    """Heads and features that are handed over, with no network behind them."""

    def of_head(self, output: ModelOutput, head: str) -> Tensor:
        return output.features[head]

    @property
    def _features(self) -> str:
        return "penultimate"


def said(supervised: Tensor, distilled: Tensor | None = None) -> ModelOutput:
    """An output whose heads have these probabilities; the features are their first two columns."""
    heads = {"supervised": supervised, "distilled": supervised if distilled is None else distilled}
    logits = {name: q.clamp(min=1e-30).log() for name, q in heads.items()}
    return ModelOutput(logits["supervised"], logits | {"penultimate": supervised[:, :2]})


def chosen(count: int = 4, seed: int = 0, **options) -> Tensor:
    return Given(**options).select(said(POOL), said(LABELLED), TARGET, count, seed).rows


def test_farthest_first_in_the_simplex_by_hand() -> None:
    selection = Given().select(said(POOL), said(LABELLED), TARGET, 4, 0)
    assert selection.rows.tolist() == [2, 1, 3, 0]
    assert selection.radii.tolist() == pytest.approx([1.3491, 1.0677, 0.5757, 0.1414], abs=1e-4)


def test_the_mixture_that_is_chosen_by_is_even_whatever_predicts() -> None:
    other = POOL.flip(0)
    output = said(POOL, other)
    mixed = Given(alpha=0.2, beta=0.5).probabilities(output)
    torch.testing.assert_close(mixed, (POOL + other) / 2)
    torch.testing.assert_close(Given(score="supervised").probabilities(output), POOL)
    torch.testing.assert_close(Given(score="distilled").probabilities(output), other)


@pytest.mark.parametrize(("weight", "head"), [(1.0, POOL), (0.0, POOL.flip(0))])
def test_a_head_that_does_not_learn_has_no_say(weight: float, head: Tensor) -> None:
    method = Given(supervised_weight=weight)
    torch.testing.assert_close(method.probabilities(said(POOL, POOL.flip(0))), head)


def test_each_strategy_is_what_it_is_called() -> None:
    features, known = POOL[:, :2], LABELLED[:, :2]
    assert torch.equal(chosen(2, strategy="coreset"), feature_coreset(features, known, 2)[0])
    assert torch.equal(chosen(2, strategy="uncertainty"), most_uncertain(POOL, 2))
    assert chosen(1, strategy="uncertainty").tolist() == [3]
    assert torch.equal(chosen(2, strategy="badge"), badge(POOL, features, 2))
    assert 0 not in chosen(2, strategy="classbalanced").tolist()  # Its class has two labels.


@pytest.mark.parametrize(
    "options",
    [
        *({"strategy": name} for name in ("pcoreset", "coreset", "uncertainty", "badge")),
        *({"strategy": name} for name in ("random", "classbalanced")),
        {"strategy": "badge", "badge_sampling": "kmeanspp"},
    ],
    ids=str,
)
def test_rows_are_distinct_and_seeded(options: dict[str, str]) -> None:
    rows = chosen(**options)
    assert sorted(rows.tolist()) == [0, 1, 2, 3]
    assert torch.equal(rows, chosen(**options))


def test_it_chooses_between_rounds() -> None:
    assert isinstance(PCoreSet(), Acquisition)
