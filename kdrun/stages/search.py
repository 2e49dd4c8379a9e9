"""The stage that chooses the student's architecture, without training."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
import yaml
from torch import nn

from kdrun import distributed
from kdrun.architectures.cost import Budget, Cost, cost_of
from kdrun.architectures.space import Choices, SearchSpace
from kdrun.architectures.strategy import FAILED, Evaluation, Problem, Strategy
from kdrun.assembly import build_untrained, moved, sample_batch
from kdrun.data.module import DataModule
from kdrun.data.seeding import stream
from kdrun.errors import UserError
from kdrun.evaluation import evaluation_device
from kdrun.files import read_json, write_atomically, write_json
from kdrun.outputs import Batch
from kdrun.parameters import NonNegativeInt, PositiveInt
from kdrun.stages.stage import Context, Stage
from kdrun.stages.training import architecture

STATE, HISTORY, FOUND = "search.json", "history.csv", "architecture.yaml"
SAVE_EVERY = 5
"""Candidates between two writings of the state; a stopped search tries no more than these again."""
SMALL_SPACE = 128
"""Spaces up to this size are gone through before anything runs, to see that the budget can be
kept."""
CONTROL = 7
"""Names the random stream of ``take=random``."""


class Scorer(Protocol):
    """Gives candidates their scores.

    Attributes:
        scores: names of the scores; what else ``open`` returns is kept beside them.
        batch_size: of the batch; ``batch_seed`` chooses it.
    """

    scores: ClassVar[tuple[str, ...]]
    batch_size: int
    batch_seed: int | None

    def seeded(self, seed: int) -> Scorer:
        """The same, with the run's seed where none was given."""

    def open(
        self, teacher: Callable[[int], nn.Module], batch: Batch
    ) -> Callable[[Callable[[int], nn.Module]], dict[str, float]]:
        """What scores one candidate; networks are made with the seed of their weights."""

    def ranking(self, evaluations: Sequence[Evaluation]) -> list[float]:
        """How good candidates are, the larger the better."""


class Search(Stage):
    """Try architectures and leave one, which is the student of all later stages.

    A candidate is the configured student with some of its options replaced. The artefact holds
    every candidate tried (``history.csv``), the best ones (``architecture.yaml``), and, while it is
    unfinished, the state from which it goes on. The words that make another command use the
    architecture are printed.

    Args:
        space: values by option of the student (``kdrun.architectures.space.SearchSpace``).
        strategy: what to try next.
        scorer: how a candidate is judged.
        evaluations: candidates that are tried; a candidate that comes again is looked up.
        max_parameters: budget; null: none. Likewise ``max_multiply_adds`` of one sample, and
            ``max_layers``, convolutions and linear layers.
        take: which candidate is the student: the ``best``, or, for comparison, the ``worst`` or a
            ``random`` one.
        top: candidates listed in ``architecture.yaml``.
        seed: of the strategy; null: the run's.
    """

    kind: ClassVar[str] = "architecture"
    shared: ClassVar[bool] = True

    def __init__(
        self,
        *,
        space: dict,
        strategy: Any,
        scorer: Any,
        evaluations: PositiveInt = 1000,
        max_parameters: PositiveInt | None = None,
        max_multiply_adds: PositiveInt | None = None,
        max_layers: PositiveInt | None = None,
        take: Literal["best", "worst", "random"] = "best",
        top: PositiveInt = 5,
        seed: NonNegativeInt | None = None,
    ) -> None:
        self.space = SearchSpace(space)
        self.strategy: Strategy = strategy
        self.scorer: Scorer = scorer
        self.evaluations = evaluations
        self.budget = Budget(max_parameters, max_multiply_adds, max_layers)
        self.take, self.top, self.seed = take, top, seed
        self._failure = ""

    def check(self, config: Mapping[str, Any], data: DataModule) -> None:
        """Refuse options that the student does not have, and a budget that nothing keeps."""
        student, known = config["student"], architecture(config["student"])
        for place in self.space.places:
            if place.option not in known:
                raise UserError(
                    f"space.{place.option}: the student has no such option (options: "
                    f"{', '.join(name for name in known if name != '_target_')})"
                )
        costs = _Costs(self.space, student, data)
        if self.space.size <= SMALL_SPACE:
            self._refuse_impossible([costs(choices) for choices in self.space])
        else:
            ends = [tuple(0 for _ in self.space.places)]
            ends.append(tuple(len(place.values) - 1 for place in self.space.places))
            for choices in ends:
                costs(choices)

    def run(self, context: Context, name: str) -> None:
        """Search, or find the result, and make the student what was found."""
        super().run(context, name)
        history = read_history(context.artefacts[name].path(STATE))
        chosen = self._taken(history, self._seed(context))
        options = self.space.options(chosen.choices)
        words = student_words(options)
        student = {**context.config["student"], **options}
        context.config = {**context.config, "student": student}
        context.result["student"] = options
        context.result[name] = {
            "words": words,
            "taken": self.take,
            "evaluations": len(history),
            "different": len({each.choices for each in history}),
            "scores": chosen.scores,
            **chosen.facts,
        }
        told = ", ".join(f"{key} {value:.4g}" for key, value in chosen.scores.items())
        context.console.say(
            f"{name}: the {self.take} of {len(history)} architectures: {words} "
            f"({chosen.facts['parameters']:,.0f} parameters; {told})"
        )

    def key(self, context: Context) -> dict[str, Any]:
        """Space, strategy, scorer, budget, both architectures and the data."""
        config = context.config
        return {
            "space": [[p.option, p.entry, list(p.values)] for p in self.space.places],
            "strategy": [type(self.strategy).__name__, vars(self.strategy)],
            "scorer": [type(self.scorer).__name__, vars(self.scorer.seeded(config["seed"]))],
            "evaluations": self._count(context),
            "budget": asdict(self.budget),
            "seed": self._seed(context),
            "teacher": architecture(config["teacher"]),
            "student": architecture(config["student"]),
            "data": context.data.fingerprint,
        }

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Try one candidate after the other, from where an interrupted search was."""
        history = read_history(directory / STATE)
        costs = _Costs(self.space, context.config["student"], context.data)
        problem = Problem(
            self.space,
            lambda choices: self.budget.admits(costs(choices)),
            self.scorer.ranking,
            self._seed(context),
        )
        if history:
            context.console.say(f"{name}: continuing after {len(history)} architectures")
        score = self._scoring(context)
        known = {each.choices: each for each in history}
        count = self._count(context)
        while len(history) < count:
            if context.watch.received:
                self._save(directory, history)
                context.watch.raise_if_received()
            choices = self.strategy.propose(problem, history)
            if choices is None:
                break
            if choices not in known:
                known[choices] = self._evaluated(choices, score, costs(choices))
            history.append(known[choices])
            if len(history) % SAVE_EVERY == 0:
                self._save(directory, history)
        if not history:
            raise UserError(
                f"{name}: no architecture was found that keeps the budget ({self._limits()}); "
                "raise it or change the space"
            )
        if all(FAILED in each.scores.values() for each in history):
            # Nothing is known of candidates that an earlier attempt has tried.
            why = f"; the last: {self._failure}" if self._failure else ""
            raise UserError(f"{name}: no architecture could be scored{why}")
        self._write(directory, history)

    # -- parts -------------------------------------------------------------------------------------

    def _scoring(self, context: Context) -> Callable[[Choices], dict[str, float]]:
        config, data = context.config, context.data
        device = evaluation_device(config["trainer"]["accelerator"])
        scorer = self.scorer.seeded(config["seed"])
        loader = data.train(
            batch_size=scorer.batch_size,
            seed=scorer.batch_seed,
            device=device,
            augment=False,
        )
        batch = loader.replay(0, 0)

        def maker(node: Mapping[str, Any]) -> Callable[[int], nn.Module]:
            return lambda seed: build_untrained(node, data, seed).to(device)

        try:
            score = scorer.open(maker(config["teacher"]), batch)
        except ValueError as error:
            raise UserError(f"teacher: {error}") from error

        def scored(choices: Choices) -> dict[str, float]:
            return score(maker({**config["student"], **self.space.options(choices)}))

        return scored

    def _evaluated(
        self, choices: Choices, score: Callable[[Choices], dict[str, float]], cost: Cost
    ) -> Evaluation:
        facts = {name: float(value) for name, value in asdict(cost).items()}
        try:
            found = score(choices)
        except (ValueError, UserError) as error:
            # One architecture that cannot be compared does not end a search.
            self._failure = str(error)
            return Evaluation(choices, dict.fromkeys(self.scorer.scores, FAILED), facts)
        scores = {name: found.pop(name) for name in self.scorer.scores}
        return Evaluation(choices, scores, facts | found)

    def _taken(self, history: Sequence[Evaluation], seed: int) -> Evaluation:
        values = self.scorer.ranking(history)
        order = sorted(range(len(history)), key=values.__getitem__)
        order = [number for number in order if FAILED not in history[number].scores.values()]
        if self.take == "random":
            distinct = list(dict.fromkeys(history[number].choices for number in sorted(order)))
            drawn = int(torch.randint(len(distinct), (), generator=stream(seed, CONTROL)))
            return next(each for each in history if each.choices == distinct[drawn])
        return history[order[-1] if self.take == "best" else order[0]]

    def _refuse_impossible(self, costs: Sequence[Cost]) -> None:
        if any(map(self.budget.admits, costs)):
            return
        smallest = {
            name: min(asdict(cost)[name] for cost in costs)
            for name, limit in asdict(self.budget).items()
            if limit is not None
        }
        told = ", ".join(f"{value:,} {name}" for name, value in smallest.items())
        raise UserError(
            f"search: none of {len(costs)} architectures keeps the budget ({self._limits()}); the "
            f"smallest values are {told}"
        )

    def _limits(self) -> str:
        limits = {name: limit for name, limit in asdict(self.budget).items() if limit is not None}
        return ", ".join(f"max_{name}={limit}" for name, limit in limits.items())

    def _seed(self, context: Context) -> int:
        return context.config["seed"] if self.seed is None else self.seed

    def _count(self, context: Context) -> int:
        return self.evaluations if context.limit_batches is None else min(self.evaluations, 2)

    def _save(self, directory: Path, history: Sequence[Evaluation]) -> None:
        if distributed.rank() == 0:
            write_json(directory / STATE, {"history": [asdict(each) for each in history]})

    def _write(self, directory: Path, history: Sequence[Evaluation]) -> None:
        """The finished search."""
        self._save(directory, history)
        if distributed.rank() != 0:
            return
        text = io.StringIO()
        rows = [self._row(number, each) for number, each in enumerate(history)]
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(text, list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(directory / HISTORY, text.getvalue())
        values = self.scorer.ranking(history)
        order = sorted(range(len(history)), key=values.__getitem__, reverse=True)
        best = list({history[number].choices: number for number in reversed(order)}.values())[::-1]
        listed = [
            {"options": self.space.options(history[number].choices), **rows[number]}
            for number in best[: self.top]
        ]
        write_atomically(directory / FOUND, yaml.safe_dump(listed, sort_keys=False))

    def _row(self, number: int, evaluation: Evaluation) -> dict[str, Any]:
        words = student_words(self.space.options(evaluation.choices))
        return {"evaluation": number, "words": words, **evaluation.facts, **evaluation.scores}


def student_words(options: Mapping[str, Any]) -> str:
    """What makes a command use these options: ``student.blocks=[1,3,5]``."""

    def spelt(value: Any) -> str:
        return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)

    return " ".join(f"student.{name}={spelt(value)}" for name, value in options.items())


class _Costs:
    """The cost of every candidate asked for, computed once."""

    def __init__(self, space: SearchSpace, student: Mapping[str, Any], data: DataModule) -> None:
        self.space, self.student, self.data = space, student, data
        self.inputs = moved(sample_batch(data).rows(slice(1)), "meta").inputs
        self.known: dict[Choices, Cost] = {}

    def __call__(self, choices: Choices) -> Cost:
        if choices not in self.known:
            node = {**self.student, **self.space.options(choices)}
            self.known[choices] = cost_of(
                lambda: build_untrained(node, self.data, seed=0), self.inputs
            )
        return self.known[choices]


def read_history(path: Path) -> list[Evaluation]:
    """What a search has tried so far; nothing where it has written nothing."""
    if not path.exists():
        return []
    return [
        Evaluation(tuple(each["choices"]), each["scores"], each["facts"])
        for each in read_json(path)["history"]
    ]
