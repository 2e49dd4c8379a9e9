"""In which order candidates are tried: all, at random, or by aging evolution.

A strategy is a function of what was tried so far: the random numbers of a step are named by the
seed and the number of the step, so a search that is stopped goes on exactly as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from kdrun.architectures.space import Choices, SearchSpace
from kdrun.data.seeding import stream
from kdrun.parameters import PositiveInt, checked_constructor

TRIES = 1000
"""Random candidates that are drawn before it is concluded that none fits the budget."""
FAILED = float("-inf")
"""Score of a candidate that could not be built or scored."""


@dataclass(frozen=True)
class Evaluation:
    """One candidate that was tried.

    Attributes:
        choices: the candidate.
        scores: by name; the larger the better.
        facts: what else is known of it (its cost, other measures).
    """

    choices: Choices
    scores: dict[str, float]
    facts: dict[str, float] = field(default_factory=dict)


Ranking = Callable[[Sequence[Evaluation]], list[float]]
"""How good each of some evaluated candidates is, the larger the better."""


@dataclass(frozen=True)
class Problem:
    """What a strategy works with.

    Attributes:
        space: the candidates.
        admits: whether a candidate keeps the budget.
        ranking: how good candidates are.
        seed: of everything random.
    """

    space: SearchSpace
    admits: Callable[[Choices], bool]
    ranking: Ranking
    seed: int = 0


class Strategy(Protocol):
    """Says what to try next."""

    def propose(self, problem: Problem, history: Sequence[Evaluation]) -> Choices | None:
        """The next candidate, which keeps the budget; None where there is no other."""


class Exhaustive:
    """Every candidate that keeps the budget, once, in the order of the space."""

    def propose(self, problem: Problem, history: Sequence[Evaluation]) -> Choices | None:
        """The candidate after the last one."""
        after = history[-1].choices if history else None
        for choices in problem.space:
            if (after is None or choices > after) and problem.admits(choices):
                return choices
        return None


class RandomSearch:
    """Candidates at random, with repetition."""

    def propose(self, problem: Problem, history: Sequence[Evaluation]) -> Choices | None:
        """A random candidate that keeps the budget."""
        generator = stream(problem.seed, len(history))
        for _ in range(TRIES):
            choices = problem.space.sample(generator)
            if problem.admits(choices):
                return choices
        return None


class AgingEvolution:
    """Regularised evolution (Real et al., AAAI 2019), as DisWOT (CVPR 2023) uses it.

    After a random population, each step draws a tournament with replacement, takes one of its best
    as the parent, changes one choice of it, and lets the oldest member go.

    Args:
        population: members.
        tournament: members drawn for each step.
        parents: of the tournament, how many may become the parent.
        mutations: choices that are changed.
        parents_from: ``worst`` is what DisWOT's released code does, by sorting the wrong way round.
        removal: which member goes: the ``oldest``, or the ``worst`` as in its ImageNet search.

    Raises:
        ValueError: more parents than the tournament has members.
    """

    @checked_constructor
    def __init__(
        self,
        *,
        population: PositiveInt = 36,
        tournament: PositiveInt = 8,
        parents: PositiveInt = 5,
        mutations: PositiveInt = 1,
        parents_from: Literal["best", "worst"] = "best",
        removal: Literal["oldest", "worst"] = "oldest",
    ) -> None:
        if parents > tournament:
            raise ValueError(f"parents={parents} cannot exceed tournament={tournament}")
        self.population, self.tournament, self.parents = population, tournament, parents
        self.mutations, self.parents_from, self.removal = mutations, parents_from, removal

    def propose(self, problem: Problem, history: Sequence[Evaluation]) -> Choices | None:
        """A random candidate while the population grows, then a child."""
        if len(history) < self.population:
            return RandomSearch().propose(problem, history)
        generator = stream(problem.seed, len(history))
        members = self.members(problem, history)
        for _ in range(TRIES):
            drawn = torch.randint(len(members), (self.tournament,), generator=generator).tolist()
            group = [members[number] for number in drawn]
            values = problem.ranking(group)
            best_first = self.parents_from == "best"
            order = sorted(range(len(group)), key=values.__getitem__, reverse=best_first)
            chosen = int(torch.randint(self.parents, (), generator=generator))
            parent = group[order[chosen]].choices
            child = problem.space.mutate(parent, generator, self.mutations)
            if child != parent and problem.admits(child):
                return child
        return None

    def members(self, problem: Problem, history: Sequence[Evaluation]) -> list[Evaluation]:
        """The population after what was tried so far."""
        if self.removal == "oldest":
            return list(history[-self.population :])
        members = list(history[: self.population])
        for newcomer in history[self.population :]:
            members.append(newcomer)
            values = problem.ranking(members)
            members.pop(min(range(len(members)), key=values.__getitem__))
        return members
