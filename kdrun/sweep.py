"""``kdrun -m``: many runs, enumerated and scheduled by Hydra's sweepers and launchers.

Hydra sees the words, not the config: each run is the command ``kdrun <words>`` and goes the way of
a single one. Its keys are handed over with slashes for dots, so that Hydra takes ``method`` and
``method.temperature`` for two entries of a flat config.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kdrun.browse import columns
from kdrun.catalogue import Catalogue, load_yaml
from kdrun.config import compose
from kdrun.errors import ConfigErrors, UserError
from kdrun.identity import fingerprint
from kdrun.job import Job, Record, mangled, read_records
from kdrun.overrides import Override
from kdrun.runs import quoted
from kdrun.search import Search, directions_of, open_study
from kdrun.sweep_groups import Groups
from kdrun.sweep_plan import Plan, read_plan


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
    plan, problems = read_plan(words, catalogue)
    if problems:
        raise ConfigErrors(problems)
    overrides, hydra_words, fail_fast = plan.overrides, plan.hydra_words, plan.fail_fast
    directory = _made_directory(plan, words)
    search = None
    if plan.searches:
        search, words_of_search = _search(plan, directory, catalogue)
        hydra_words += words_of_search
    job = Job(
        flags=tuple(flags),
        directories=tuple(str(directory) for directory in catalogue.directories[1:]),
        records=str(directory / "jobs"),
        fail_fast=fail_fast,
        search=search,
        groups=Groups(overrides) if plan.in_this_process else None,
    )
    before = {record.number: record.began for record in read_records(directory / "jobs")}
    with _alone(directory):
        try:
            stopped = multirun(overrides, hydra_words, directory, job, catalogue)
        except ValueError:
            # Optuna's sweeper closes by asking for the best trial, also where all have failed.
            if search is None or search.has_result():
                raise
            stopped = False
    # Clocks of other machines may be behind: what is new is told by what was there.
    found = read_records(directory / "jobs")
    records = [record for record in found if record.began != before.get(record.number)]
    print(summary(records, overrides, directory, flags))
    failed = any(record.status == "failed" for record in records)
    if stopped and not (fail_fast and failed):
        again = [*flags, "-m", *words]
        if plan.name is None and not any(w.startswith("hydra.sweep.dir=") for w in words):
            again.append(f"hydra.sweep.dir={directory}")
        print(f"interrupted; continue with: kdrun {shlex.join(again)}")
        return 130
    ended = all(record.status in ("done", "pruned") for record in records)
    return 0 if records and ended else 1


def summary(
    records: Sequence[Record], overrides: Iterable[Override], directory: Path, flags: Sequence[str]
) -> str:
    """The runs of a sweep with what varied and their validation results; the failed ones again."""
    from kdrun.report.sweeps import shown

    varied = {override.key for override in overrides if override.is_sweep}
    rows = []
    for record in records:
        pairs = [word.partition("=") for word in record.words]
        told = " ".join(f"{key}={shown(value)}" for key, _, value in pairs if key in varied)
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


def _made_directory(plan: Plan, words: Sequence[str]) -> Path:
    """Where a sweep keeps its records; one from a file has a place that the same words find."""
    given = [word for word in plan.hydra_words if word.startswith("hydra.sweep.dir=")]
    typed = sorted(word for word in words if not word.startswith(("sweep=", "sweeper.n_trials=")))
    ending = f"-{fingerprint({'words': typed}, 8)}" if typed else ""
    try:
        if not given and plan.name is None:
            now = time.strftime("%Y-%m-%d_%H-%M-%S")
            return _new_directory(Path("outputs", "sweeps", now).resolve())
        if given:
            place = Path(given[-1].partition("=")[2].strip("'\""))
        else:
            place = Path("outputs", "sweeps", plan.name.replace("/", "_") + ending)
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {error.filename}: {error.strerror}") from error
    return place.resolve()


def _new_directory(wanted: Path) -> Path:
    """A directory of that name, or with a number behind it where another process was first."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        place = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with contextlib.suppress(FileExistsError):
            place.mkdir()
            return place
    raise AssertionError("there is always another number")


def _search(plan: Plan, directory: Path, catalogue: Catalogue) -> tuple[Search, list[str]]:
    """The study of a search, new or gone on with, and what its sweeper must be told."""
    typed = dict(word.removeprefix("hydra.sweeper.").split("=", 1) for word in plan.hydra_words)
    settings = load_yaml(catalogue.path("sweeper", plan.sweeper)) | typed
    storage = settings["storage"].replace("${hydra.sweep.dir}", str(directory))
    directions = plan.directions or directions_of(plan.objectives, _task_of(plan, catalogue))
    words = [_handed_over(override) for override in plan.overrides]
    search = Search(
        storage=storage,
        study_name=settings["study_name"],
        sitting=open_study(settings, storage, directions, words),
        objectives=plan.objectives,
        pruner=plan.pruner,
    )
    wanted = directions[0] if len(directions) == 1 else f"[{','.join(directions)}]"
    return search, [f"hydra.sweeper.direction={wanted}", *search.sitting.words]


def _task_of(plan: Plan, catalogue: Catalogue) -> str:
    """``_target_`` of the task of a search's runs."""
    first = [f"{o.key}={o.values[0]}" if o.is_sweep else o.word for o in plan.overrides]
    return compose(first, catalogue).values["task"]["_target_"]


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a sweep's directory: two processes with one set of records would lose some."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{directory}: another process works on this sweep; launcher.n_jobs gives it several"
        ) from None
    try:
        yield
    finally:
        lock.release()


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
