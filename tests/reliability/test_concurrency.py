"""Many processes that want the same thing at once: it is made once, also if one of them dies."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrun.files import read_json
from tests.reliability.interrupted import Journal, outcome, watched
from tests.tiny import run

WORDS = (
    *("method=kd", "training.epochs=1", "training.batch_size=160", "teacher.allow_chance=true"),
    *("recipe.stages.alone=null", "student.widths=[2,2,4]", "teacher.hidden=[16]"),
)
STEPS = 7
"""Of an epoch."""


def at_once(
    root: Path, each: list[tuple[str, ...]], at_step: Callable[[int], None] = lambda number: None
) -> list[int]:
    """Start forked processes, let them go together, and wait; their exit statuses.

    Forked, they share the imports: the first thing that they do is the work.
    """
    gc.collect()
    children = []
    reading, writing = os.pipe()
    for words in each:
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            os.close(writing)
            os.read(reading, 1)  # Ends when the last process has been started.
            with watched(Journal(root / "journal"), at_step):
                run(root / "out", *WORDS, *words)
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            sys.__stderr__.flush()
            os._exit(status)
    os.close(reading)
    os.close(writing)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def steps_of(root: Path) -> Counter[str]:
    """How often each step of each training was taken."""
    lines = (root / "journal").read_text().splitlines()
    return Counter(line.rpartition(" ")[0] for line in lines)


def results(root: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((root / "out").rglob("result.json"))]


@pytest.mark.parametrize("number", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_runs_started_at_once_train_their_teacher_once(tmp_path: Path, number: int) -> None:
    statuses = at_once(tmp_path, [(f"seed={seed}",) for seed in range(number)])
    assert statuses == [0] * number
    found = results(tmp_path)
    assert len(found) == number
    assert len({each["artefacts"]["teacher"] for each in found}) == 1
    steps = steps_of(tmp_path)
    teacher = {place: count for place, count in steps.items() if place.startswith("Supervised")}
    assert len(teacher) == STEPS and set(teacher.values()) == {1}, "each step once, by one process"
    assert sum(steps.values()) == STEPS * (1 + number)
    # The same as one run by itself.
    alone = tmp_path / "alone"
    with watched(Journal(tmp_path / "of one")):
        run(alone / "out", *WORDS, f"seed={number - 1}")
    expected, together = outcome(alone), outcome(tmp_path)
    assert expected and all(together[place] == expected[place] for place in expected)


def test_the_same_command_twice_at_once_does_the_work_once(tmp_path: Path) -> None:
    assert at_once(tmp_path, [(), ()]) == [0, 0]
    assert len(results(tmp_path)) == 1
    steps = steps_of(tmp_path)
    assert len(steps) == 2 * STEPS and set(steps.values()) == {1}


def test_others_go_on_where_one_was_killed(tmp_path: Path) -> None:
    """Whoever trains the teacher is killed at its fourth step, once."""

    def strike(number: int) -> None:
        if number == 4:
            try:
                os.close(os.open(tmp_path / "struck", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    statuses = at_once(tmp_path, [(f"seed={seed}",) for seed in range(3)], strike)
    assert sorted(statuses) == [-signal.SIGKILL, 0, 0]
    assert len(results(tmp_path)) == 2
    steps = steps_of(tmp_path)
    teacher = {place: count for place, count in steps.items() if place.startswith("Supervised")}
    assert len(teacher) == STEPS and max(teacher.values()) == 2, "begun by one, made by another"
    notes = list((tmp_path / "out").rglob("*.holder"))
    assert [note.name for note in notes if "network" in str(note)] == []
