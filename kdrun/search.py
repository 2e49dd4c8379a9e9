"""Searches with Optuna: continuing a study, giving up hopeless trials, several objectives."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrun.artefacts import RESULT
from kdrun.errors import UserError
from kdrun.files import read_json
from kdrun.pruning import Pruned

OF_TASK = "the task's"
OBJECTIVES = {"validation": OF_TASK, "parameters": "minimize", "seconds": "minimize"}
"""What a search can look for, and which way: the validation result at the best epoch, the size of
the student, the time its training took."""

JUDGED = "distil"
"""The stage whose epochs are judged; the teacher and the student alone are others' too."""


@dataclass(frozen=True)
class Sitting:
    """Where a study stands when work on it begins.

    Attributes:
        waiting: numbers of the trials that are asked first; ``next_number``: of those after them.
        words: overrides for Hydra's sweeper.
    """

    waiting: tuple[int, ...] = ()
    next_number: int = 0
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """What a run of a search must know of its study.

    Attributes:
        storage: where the study lies; ``study_name``: what it is called there.
        sitting: which trials the runs belong to.
        objectives: what the search looks for, in the order of the study's directions.
        pruner: config node of what gives up trials; None: nothing does.
    """

    storage: str
    study_name: str
    sitting: Sitting
    objectives: tuple[str, ...]
    pruner: Mapping[str, Any] | None

    def trial_of(self, job: int) -> int:
        """The number of the trial that the sweeper's ``job``-th run in this sitting is."""
        waiting = self.sitting.waiting
        if job < len(waiting):
            return waiting[job]
        return self.sitting.next_number + job - len(waiting)

    def judge(self, number: int) -> TrialJudge:
        """Who decides whether a trial goes on."""
        import optuna
        from hydra.utils import instantiate

        study = optuna.load_study(
            study_name=self.study_name,
            storage=self.storage,
            pruner=instantiate(dict(self.pruner)) if self.pruner else None,
        )
        return TrialJudge(optuna.trial.Trial(study, study.trials[number]._trial_id))

    def has_result(self) -> bool:
        """Whether any trial has ended with a result, now or earlier."""
        import optuna

        study = optuna.load_study(study_name=self.study_name, storage=self.storage)
        return bool(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))

    def measure(self, objective: float, directory: str | None) -> tuple[float, ...]:
        """The values of a finished run, one for each objective.

        Args:
            objective: its validation result.
            directory: where its result lies.
        """
        measured = {"validation": objective}
        if set(self.objectives) != {"validation"}:
            student = read_json(Path(directory, RESULT))["networks"]["distilled"]
            measured["parameters"] = float(student["parameters"])
            measured["seconds"] = float(student["training"]["seconds"])
        return tuple(measured[name] for name in self.objectives)


@dataclass
class TrialJudge:
    """Tells Optuna how a trial's epochs go and ends the trial where Optuna gives it up.

    Attributes:
        trial: of a study with a pruner and a single objective.
        values: the validation results so far.
    """

    trial: Any
    values: list[float] = field(default_factory=list)

    def __call__(self, stage: str, epoch: int, value: float) -> None:
        """Judge an epoch.

        Raises:
            Pruned: the trial is not worth going on with.
        """
        if stage != JUDGED:
            return
        self.values.append(value)
        self.trial.report(value, epoch)
        if self.trial.should_prune():
            self.trial.set_user_attr("given_up_after_epoch", epoch)
            raise Pruned(epoch)

    def best(self) -> float:
        """The best value so far, which stands for the trial in its study."""
        maximize = self.trial.study.direction.name == "MAXIMIZE"
        return max(self.values) if maximize else min(self.values)


def directions_of(objectives: Sequence[str], task: str) -> list[str]:
    """``maximize`` or ``minimize`` for each objective of a search.

    Args:
        objectives: their names.
        task: ``_target_`` of the task, which knows what a better validation result is.
    """
    from hydra.utils import get_class

    of_task = {"max": "maximize", "min": "minimize"}[get_class(task).direction]
    return [of_task if OBJECTIVES[name] == OF_TASK else OBJECTIVES[name] for name in objectives]


def open_study(
    settings: Mapping[str, Any], storage: str, directions: Sequence[str], words: Sequence[str]
) -> Sitting:
    """How to go on with a study, where there is one.

    ``n_trials`` counts all its trials. Those that were interrupted are closed and asked again with
    their values, so that their runs continue where they were.

    Args:
        settings: of the sweeper.
        storage: where the study lies.
        directions: of the objectives.
        words: what is handed to the sweeper, the ranges and choices among it.

    Raises:
        UserError: the study cannot be read, has that many trials, or looks for something else.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    broken = (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, RuntimeError, ValueError)
    try:
        study = optuna.load_study(study_name=settings["study_name"], storage=storage)
    except KeyError:
        return Sitting()
    except broken as error:
        raise UserError(f"sweeper.storage={storage}: {str(error).splitlines()[0]}") from error
    _refuse_another_search(study, storage, directions, words)
    states = optuna.trial.TrialState
    for trial in study.trials:
        if trial.state == states.RUNNING:
            optuna.trial.Trial(study, trial._trial_id).set_user_attr(INTERRUPTED, True)
            study.tell(trial.number, state=states.FAIL)
            if trial.params:
                _ask_again(study, trial.params)
    trials = [trial for trial in study.trials if INTERRUPTED not in trial.user_attrs]
    finished = [trial for trial in trials if trial.state.is_finished()]
    left = int(settings["n_trials"]) - len(finished)
    if left <= 0:
        raise UserError(
            f"the study in {storage} has {len(finished)} trials, {_best(study)}; "
            "raise sweeper.n_trials to go on"
        )
    waiting = tuple(trial.number for trial in study.trials if trial.state == states.WAITING)
    # The same seed would draw the same first trials again.
    seed = settings.get("sampler.seed", settings["sampler"]["seed"])
    rest = [f"hydra.sweeper.n_trials={left}"]
    if seed != "null":
        rest.append(f"hydra.sweeper.sampler.seed={int(seed) + len(study.trials)}")
    return Sitting(waiting, len(study.trials), tuple(rest))


def _refuse_another_search(
    study: Any, storage: str, directions: Sequence[str], words: Sequence[str]
) -> None:
    """A study keeps its directions, its choices and the kinds of its ranges."""
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
    from optuna.distributions import check_distribution_compatibility

    advice = (
        "begin another one with hydra.sweep.dir=..., or with sweeper.study_name=... where you have "
        "chosen the storage"
    )
    kept = [direction.name.lower() for direction in study.directions]
    if kept != list(directions):
        raise UserError(
            f"the study in {storage} was begun to {', '.join(kept)}, this search is to "
            f"{', '.join(directions)}; {advice}"
        )
    space, _ = create_params_from_overrides(list(words))
    for trial in study.get_trials(deepcopy=False):
        for name, before in trial.distributions.items():
            if name not in space:
                continue
            try:
                check_distribution_compatibility(before, space[name])
            except ValueError as error:
                raise UserError(
                    f"{name.replace('/', '.')}: the study in {storage} draws it from "
                    f"{_spelled(before)}, this search from {_spelled(space[name])}, and a study "
                    f"keeps its choices; {advice}"
                ) from error


def _spelled(distribution: Any) -> str:
    """Choices, or a range and its kind, for a message."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return ",".join(map(str, distribution.choices))
    kind = type(distribution).__name__.removesuffix("Distribution")
    return f"{distribution.low:g} to {distribution.high:g} ({kind})"


def _ask_again(study: Any, values: Mapping[str, Any]) -> None:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.enqueue_trial(dict(values))


INTERRUPTED = "interrupted"
"""Mark of a trial that was closed because its run was interrupted."""


def _best(study: Any) -> str:
    """What a study has found, for a message."""
    best = study.best_trials if len(study.directions) > 1 else None
    if best is not None:
        return f"{len(best)} of them best in one way or another"
    try:
        return f"best value {study.best_value:.4f} with {study.best_params}"
    except ValueError:
        return "none of them finished"
