"""One run of a sweep, in whatever process the launcher puts it, and the record it leaves."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdrun.errors import Interrupted, UserError
from kdrun.files import parse_json, write_json
from kdrun.pruning import Pruned, judged_by
from kdrun.search import Search
from kdrun.sweep_groups import Groups


@dataclass
class Record:
    """What is known of one run of a sweep; a JSON file in the sweep's directory.

    Attributes:
        number: position in the sweep.
        words: the command ``kdrun <words>`` does the same run again.
        status: ``running``, ``done``, ``failed``, ``interrupted``, or ``pruned`` where a search has
            given it up.
        began: time of the start, seconds since 1970; ``seconds``: how long it took.
        objective: the validation result; of a pruned run the best one so far.
        directory: where its result lies.
        error: the last line of what went wrong; ``trace``: all of it.
    """

    number: int
    words: list[str]
    status: str = "running"
    began: float = 0.0
    seconds: float = 0.0
    objective: float | None = None
    directory: str | None = None
    error: str = ""
    trace: str = ""

    def write(self, directory: Path) -> None:
        """Write the record, whole or not at all."""
        write_json(directory / f"{self.number}.json", asdict(self))


class JobFailed(Exception):
    """A run of a search failed: the trial is recorded as such and the search goes on."""


@dataclass(frozen=True)
class Job:
    """What Hydra calls for each run.

    Attributes:
        flags: flags that the command of each run needs.
        directories: config folders besides kdrun's own.
        records: where records are written.
        fail_fast: end the sweep with the first failure.
        search: the study that the runs are trials of; its sweeper is told of failures. Without one
            they are only recorded, so that nothing keeps the other runs from starting.
        groups: does runs side by side where it can; None where each may be in another process.
    """

    flags: tuple[str, ...]
    directories: tuple[str, ...]
    records: str
    fail_fast: bool
    search: Search | None = None
    groups: Groups | None = None

    def __call__(self, config: Any) -> float | tuple[float, ...]:
        """Run the overrides that Hydra chose; returns the objective, or several of a search.

        Raises:
            JobFailed: the run failed and the sweeper is to know.
            KeyboardInterrupt: the run was interrupted, or failed and the sweep must end.
        """
        from hydra.core.hydra_config import HydraConfig

        settings = HydraConfig.get()
        number = int(settings.job.num)
        if self.search is not None:
            number = self.search.trial_of(number)
        record = Record(number, job_words(settings.overrides.task))
        record.began = time.time()
        record.write(Path(self.records))
        print(f"\nrun {record.number}: {' '.join(record.words)}", flush=True)
        judge = self.search.judge(number) if self.search and self.search.pruner else None
        values: tuple[float, ...] = (math.nan,)
        try:
            with judged_by(judge) if judge else contextlib.nullcontext():
                values = self._run(record)
            record.status = "done"
        except Pruned as given_up:
            record.status, record.error = "pruned", str(given_up)
            record.objective = judge.best()
            values = (record.objective,)
            print(f"run {record.number} {given_up}", flush=True)
        except (Interrupted, KeyboardInterrupt):
            record.status = "interrupted"
        except Exception as error:
            record.status = "failed"
            record.error = str(error).strip() or type(error).__name__
            if not isinstance(error, UserError):
                record.error = f"{type(error).__name__}: {record.error.splitlines()[-1]}"
                record.trace = traceback.format_exc()
            print(f"run {record.number} failed: {record.error}", flush=True)
        record.seconds = time.time() - record.began
        record.write(Path(self.records))
        if record.status == "interrupted" or (self.fail_fast and record.status == "failed"):
            raise KeyboardInterrupt
        if record.status == "failed" and self.search is not None:
            raise JobFailed(record.error)
        return values[0] if len(values) == 1 else values

    def _run(self, record: Record) -> tuple[float, ...]:
        """Do the run of a record, note its result there, return what the sweeper is to know."""
        from kdrun.catalogue import open_catalogue
        from kdrun.run import run

        run_words = run if self.groups is None else self.groups.run
        outcome = run_words(record.words, self.flags, open_catalogue(self.directories))
        if outcome.exit_code in (130, 143):
            raise KeyboardInterrupt
        if outcome.exit_code != 0:
            raise UserError(f"exit status {outcome.exit_code}, see its lines above")
        if outcome.objective is None or not math.isfinite(outcome.objective):
            raise UserError("the validation result is not a number: training diverged")
        record.objective, record.directory = outcome.objective, outcome.directory
        if self.search is None:
            return (outcome.objective,)
        return self.search.measure(outcome.objective, outcome.directory)


def read_records(directory: Path) -> list[Record]:
    """The records of a sweep, in the order of its runs.

    Raises:
        UserError: one is damaged.
    """
    records = []
    for path in directory.glob("*.json"):
        try:
            records.append(Record(**parse_json(path.read_bytes())))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return sorted(records, key=lambda record: record.number)


def mangled(key: str) -> str:
    """A dotted key as one flat key for Hydra."""
    return key.replace(".", "/")


def job_words(words: Iterable[str]) -> list[str]:
    """Hydra's overrides as words of a kdrun command."""
    pairs = [word.partition("=") for word in words]
    return [f"{key.replace('/', '.')}={value}" for key, _, value in pairs]
