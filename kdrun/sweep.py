"""``kdrun -m``: many runs, enumerated and scheduled by Hydra's sweepers and launchers.

Hydra sees the words, not the config: each run is the command ``kdrun <words>`` and goes the way of
a single one. Its keys are handed over with slashes for dots, so that Hydra takes ``method`` and
``method.temperature`` for two entries of a flat config.
"""

from __future__ import annotations

import itertools
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun.browse import columns
from kdrun.catalogue import (
    SWEEP_GROUPS,
    Catalogue,
    entries,
    load_yaml,
    target_of,
    unknown_choice,
)
from kdrun.checks import unknown_option
from kdrun.config import compose_parsed
from kdrun.errors import ConfigErrors, UserError
from kdrun.job import Job, Record, mangled, read_records
from kdrun.overrides import Override, parse
from kdrun.parameters import find_source
from kdrun.runs import quoted

CHECKED_COMBINATIONS = 200
"""Up to so many runs are checked one by one before the first starts; of a larger grid, every value
beside the first value of all others, and every combination of groups."""

EXTRAS = {
    "hydra_joblib_launcher": "joblib",
    "hydra_submitit_launcher": "slurm",
    "hydra_ray_launcher": "ray",
    "hydra_optuna_sweeper": "optuna",
}
"""Packages of launchers and sweepers, and the extra of kdrun that installs each."""


def sweep(words: Sequence[str], flags: Sequence[str], catalogue: Catalogue) -> int:
    """Run a sweep to its end, print its summary.

    Args:
        words: ``key=value`` words, some with several values, and settings of launcher and sweeper.
        flags: flags that every run needs too (``--config-dir``).
        catalogue: the config files.

    Returns:
        The exit status: 0, or 1 where a run failed, or 130 after an interruption.

    Raises:
        UserError: some word is wrong; nothing was run.
    """
    plan, problems = _read(words, catalogue)
    if problems:
        raise ConfigErrors(problems)
    overrides, hydra_words, fail_fast = plan.overrides, plan.hydra_words, plan.fail_fast
    directory = _directory(hydra_words)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {directory}: {error.strerror}") from error
    if plan.searches:
        hydra_words += _continue_study(hydra_words, directory, catalogue)
    job = Job(
        flags=tuple(flags),
        directories=tuple(str(directory) for directory in catalogue.directories[1:]),
        records=str(directory / "jobs"),
        fail_fast=fail_fast,
        raise_failures=plan.searches,
    )
    began = time.time()
    stopped = multirun(overrides, hydra_words, directory, job, catalogue)
    records = [record for record in read_records(directory / "jobs") if record.began >= began]
    print(summary(records, overrides, directory, flags))
    failed = any(record.status == "failed" for record in records)
    if stopped and not (fail_fast and failed):
        again = [*flags, "-m", *words]
        if not any(word.startswith("hydra.sweep.dir=") for word in words):
            again.append(f"hydra.sweep.dir={directory}")
        print(f"interrupted; continue with: kdrun {shlex.join(again)}")
        return 130
    return 1 if any(record.status != "done" for record in records) or not records else 0


def summary(
    records: Sequence[Record], overrides: Iterable[Override], directory: Path, flags: Sequence[str]
) -> str:
    """The runs of a sweep with what varied and their validation results; the failed ones again."""
    varied = {override.key for override in overrides if override.is_sweep}
    rows = []
    for record in records:
        told = " ".join(word for word in record.words if word.partition("=")[0] in varied)
        value = "" if record.objective is None else f"{record.objective:.4f}"
        # Nothing runs any more: its process was ended before it could tell.
        status = "stopped" if record.status == "running" else record.status
        rows.append((f"#{record.number}", told, status, value))
    failed = [record for record in records if record.status == "failed"]
    lines = [columns([("", "", "", "validation"), *rows])] if rows else []
    lines.append(f"{len(records)} runs, {len(failed)} failed  {directory}")
    for record in failed:
        lines.append(f"  #{record.number} {record.error}")
        if record.trace:
            lines.append(f"     {directory}/jobs/{record.number}.json has the traceback")
        lines.append(f"     kdrun {shlex.join([*flags, *record.words])}")
    return "\n".join(lines)


# -- words -----------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """A sweep as it was typed: words of the runs, settings of launcher and sweeper for Hydra."""

    overrides: list[Override]
    hydra_words: list[str]
    fail_fast: bool

    @property
    def searches(self) -> bool:
        """Whether a sweeper chooses values itself, instead of running all that were typed."""
        return any(word.startswith("hydra/sweeper=") for word in self.hydra_words)


def check(words: Sequence[str], catalogue: Catalogue) -> list[str]:
    """What is wrong with the words of a sweep, a line each; nothing is run."""
    return _read(words, catalogue)[1]


def _read(words: Sequence[str], catalogue: Catalogue) -> tuple[_Plan, list[str]]:
    """The sweep that was typed, and what is wrong with it."""
    settings, job_words_typed = _split(words)
    fail_fast, settings = _fail_fast(settings)
    overrides, problems = parse(job_words_typed, catalogue)
    hydra_words, setting_problems = hydra_settings(settings, catalogue)
    plan = _Plan(overrides, hydra_words, fail_fast)
    problems += setting_problems
    if not plan.searches:
        problems += [
            f"{o.word}: a range without steps needs a search (sweeper=optuna)"
            for o in overrides
            if o.interval
        ]
    problems += _check_values(overrides, catalogue)
    return plan, list(dict.fromkeys(problems))


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words for launcher and sweeper, and words for the runs."""
    ours = ("launcher", "sweeper", "hydra", "fail_fast")
    settings = [
        word
        for word in words
        if word.lstrip("+").partition("=")[0].split(".")[0].split("/")[0] in ours
    ]
    return settings, [word for word in words if word not in settings]


def _fail_fast(settings: list[str]) -> tuple[bool, list[str]]:
    given = [word for word in settings if word.startswith("fail_fast")]
    for word in given:
        if word.lower() not in ("fail_fast=true", "fail_fast=false"):
            raise UserError(f"{word}: fail_fast must be true or false")
    return "fail_fast=true" in map(str.lower, given), [w for w in settings if w not in given]


def hydra_settings(settings: Sequence[str], catalogue: Catalogue) -> tuple[list[str], list[str]]:
    """Settings of launcher and sweeper as Hydra's overrides, and what is wrong with them."""
    words, problems = [], []
    chosen: dict[str, str] = {}
    for word in settings:
        key, _, name = word.partition("=")
        if key in SWEEP_GROUPS:
            choices = ["basic", *catalogue.choices(key)]
            if name not in choices:
                problems.append(unknown_choice(key, name, choices))
                continue
            chosen[key] = name
            problems += _missing_package(key, name, catalogue)
            words.append(f"hydra/{key}={name if name == 'basic' else f'kdrun/{name}'}")
    for word in settings:
        key, equals, _ = word.partition("=")
        group, _, option = key.partition(".")
        if group in SWEEP_GROUPS and option:
            if group not in chosen or chosen[group] == "basic":
                problems.append(f"{word}: say which {group} first ({group}=...)")
                continue
            path = catalogue.path(group, chosen[group])
            known = [entry.key for entry in entries(path) if entry.key != "_target_"]
            node = load_yaml(path)
            inside = any(option.startswith(f"{name}.") and node.get(name) == {} for name in node)
            if option not in known and not inside:
                problems.append(unknown_option(f"{group}.{option}", known, chosen[group]))
                continue
            words.append(f"{'+' if inside else ''}hydra.{word}")
        elif group not in SWEEP_GROUPS:
            words.append(word)
        elif not equals:
            problems.append(f"{word}: '=' is missing; options are written key=value")
    return words, problems


def _missing_package(group: str, name: str, catalogue: Catalogue) -> list[str]:
    if name == "basic":
        return []
    target = target_of(catalogue.path(group, name)) or ""
    if find_source(target.rpartition(".")[0]) is not None:
        return []
    package = target.split(".")[1]
    extra = EXTRAS.get(package, package)
    return [f"{group}={name}: is not installed; pip install 'kdrun[{extra}]'"]


def _directory(hydra_words: Sequence[str]) -> Path:
    given = [word for word in hydra_words if word.startswith("hydra.sweep.dir=")]
    if given:
        return Path(given[-1].partition("=")[2].strip("'\"")).resolve()
    return Path("outputs", "sweeps", time.strftime("%Y-%m-%d_%H-%M-%S")).resolve()


def _continue_study(hydra_words: Sequence[str], directory: Path, catalogue: Catalogue) -> list[str]:
    """Overrides that make ``sweeper.n_trials`` the total of a study that exists already.

    Raises:
        UserError: the study has that many trials.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    typed = dict(word.removeprefix("hydra.sweeper.").split("=", 1) for word in hydra_words)
    settings = load_yaml(catalogue.path("sweeper", "optuna")) | typed
    storage = settings["storage"].replace("${hydra.sweep.dir}", str(directory))
    try:
        study = optuna.load_study(study_name=settings["study_name"], storage=storage)
    except KeyError:  # There is no such study yet.
        return []
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    left = int(settings["n_trials"]) - len(finished)
    if left <= 0:
        raise UserError(
            f"the study in {storage} has {len(finished)} trials, best value "
            f"{study.best_value:.4f} with {study.best_params}; raise sweeper.n_trials to go on"
        )
    # The same seed would draw the same first trials again.
    seed = int(settings.get("sampler.seed", settings["sampler"]["seed"]))
    return [
        f"hydra.sweeper.n_trials={left}",
        f"hydra.sweeper.sampler.seed={seed + len(study.trials)}",
    ]


# -- checks ----------------------------------------------------------------------------------------


def _check_values(overrides: Sequence[Override], catalogue: Catalogue) -> list[str]:
    problems: list[str] = []
    for words in _combinations(overrides):
        single, unread = parse(words, catalogue)
        try:
            compose_parsed(single, catalogue, unread)
        except ConfigErrors as error:
            problems += error.problems
    return list(dict.fromkeys(problems))


def _combinations(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Words of the runs to check; see ``CHECKED_COMBINATIONS``."""
    spelled = [
        [f"{o.key}={value}" for value in o.values] if o.is_sweep else [o.word] for o in overrides
    ]
    if math.prod(map(len, spelled)) <= CHECKED_COMBINATIONS:
        yield from map(list, itertools.product(*spelled))
        return
    groups = [
        words if override.is_choice else words[:1]
        for override, words in zip(overrides, spelled, strict=True)
    ]
    yield from map(list, itertools.islice(itertools.product(*groups), CHECKED_COMBINATIONS))
    for number, words in enumerate(spelled):
        for word in words[1:]:
            yield [word if i == number else first[0] for i, first in enumerate(spelled)]


# -- Hydra -----------------------------------------------------------------------------------------


def multirun(
    overrides: Sequence[Override],
    hydra_words: Sequence[str],
    directory: Path,
    job: Callable[[Any], float],
    catalogue: Catalogue,
) -> bool:
    """Hand the runs to Hydra's sweeper and launcher; returns whether they were interrupted."""
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # The checks have composed without Hydra's plugins; this makes it look for them again.
    Singleton.set_state(Singleton.get_state())
    words = [
        f"hydra.sweep.dir={quoted(str(directory))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/hydra_logging=none",
        "hydra/job_logging=none",
        *(word for word in hydra_words if not word.startswith("hydra.sweep.dir=")),
        *(_handed_over(override) for override in overrides),
    ]
    # What they tell of failures, the records and the summary tell too.
    for name in ("hydra", "hydra_plugins"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    trees = [tree / "sweep" for tree in catalogue.directories if (tree / "sweep").is_dir()]
    if len(trees) > 1:
        words.append(f"hydra.searchpath=[{','.join(f'file://{tree}' for tree in trees[1:])}]")
    ConfigStore.instance().store("sweep", {mangled(o.key): None for o in overrides})
    with initialize_config_dir(str(trees[0]), job_name="kdrun", version_base="1.3"):
        try:
            GlobalHydra.instance().hydra.multirun(
                config_name="sweep",
                task_function=job,
                overrides=words,
                with_log_configuration=False,
            )
        except KeyboardInterrupt:
            return True
        except (HydraException, OmegaConfBaseException) as error:
            lines = str(error.__cause__ or error).splitlines()
            raise UserError(f"launcher or sweeper: {lines[0]}") from error
    return False


def _handed_over(override: Override) -> str:
    text = override.word.partition("=")[2]
    if override.is_sweep and override.is_choice and not override.interval:
        text = ",".join(override.values)
    return f"{mangled(override.key)}={text}"
