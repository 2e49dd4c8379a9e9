from __future__ import annotations

from collections.abc import Callable

import pytest

from kdrun.architectures.space import Choices, SearchSpace
from kdrun.architectures.strategy import (
    AgingEvolution,
    Evaluation,
    Exhaustive,
    Problem,
    RandomSearch,
)

SPACE = SearchSpace({"blocks": [[1, 3, 5, 7]] * 4})


def size(choices: Choices) -> float:
    return float(sum(SPACE.options(choices)["blocks"]))


def problem(admits: Callable[[Choices], bool] = lambda choices: True, seed: int = 0) -> Problem:
    return Problem(SPACE, admits, lambda group: [each.scores["size"] for each in group], seed)


def search(strategy, of: Problem, count: int, history: list[Evaluation] | None = None):
    """Candidates scored by minus their size."""
    history = list(history or [])
    while len(history) < count and (choices := strategy.propose(of, history)) is not None:
        history.append(Evaluation(choices, {"size": -size(choices)}))
    return history


def at_least(limit: int) -> Callable[[Choices], bool]:
    return lambda choices: size(choices) >= limit


def test_exhaustive_search_tries_what_fits_once() -> None:
    tried = [each.choices for each in search(Exhaustive(), problem(at_least(20)), 1000)]
    assert tried == [choices for choices in SPACE if size(choices) >= 20]


@pytest.mark.parametrize("strategy", [RandomSearch(), AgingEvolution(population=8)])
def test_the_budget_is_kept_and_the_search_goes_on_exactly(strategy) -> None:
    of = problem(at_least(12))
    whole = search(strategy, of, 40)
    assert all(size(each.choices) >= 12 for each in whole)
    assert search(strategy, of, 40, whole[:17]) == whole
    assert search(strategy, problem(at_least(12), seed=1), 40) != whole


@pytest.mark.parametrize("strategy", [Exhaustive(), RandomSearch(), AgingEvolution()])
def test_a_budget_that_nothing_keeps(strategy) -> None:
    assert search(strategy, problem(lambda choices: False), 10) == []


def test_evolution_finds_the_smallest() -> None:
    strategy = AgingEvolution(population=10, tournament=5, parents=2)
    best = max(search(strategy, problem(at_least(10)), 150), key=lambda each: each.scores["size"])
    assert size(best.choices) == 10
    backwards = AgingEvolution(population=10, tournament=5, parents=2, parents_from="worst")
    ours, theirs = (
        sum(each.scores["size"] for each in search(s, problem(), 150)[-10:])
        for s in (strategy, backwards)
    )
    assert theirs < ours - 50, "the population grows instead"


@pytest.mark.parametrize("removal", ["oldest", "worst"])
def test_children_and_population(removal: str) -> None:
    strategy, of = AgingEvolution(population=10, removal=removal), problem()
    history = search(strategy, of, 60)
    for number in range(10, 60):
        members = strategy.members(of, history[:number])
        assert len(members) == 10
        if removal == "oldest":
            assert members == history[number - 10 : number]
        differences = [
            sum(a != b for a, b in zip(history[number].choices, each.choices, strict=True))
            for each in members
        ]
        assert min(differences) <= 1 <= max(differences), "a child is one choice from a member"
    if removal == "worst":
        kept = sorted(each.scores["size"] for each in members)
        assert kept == sorted(each.scores["size"] for each in history[:59])[-10:]


def test_a_parent_whose_neighbours_do_not_fit_ends_the_search() -> None:
    history = search(AgingEvolution(population=3), problem(lambda choices: sum(choices) == 0), 9)
    assert [each.choices for each in history] == [(0, 0, 0, 0)] * 3


def test_more_parents_than_the_tournament_are_refused() -> None:
    with pytest.raises(ValueError, match="parents=5 cannot exceed tournament=4"):
        AgingEvolution(tournament=4)
    with pytest.raises(ValueError, match="population must be integer >= 1"):
        AgingEvolution(population=0)
