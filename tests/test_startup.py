"""The start of a process: when Python's collector runs, and over what."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kdrun.startup import collect_garbage, collector_paused


@pytest.fixture(autouse=True)
def collector_on() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_pause_ends_with_an_error_too() -> None:
    with pytest.raises(ValueError, match="broke"), collector_paused():
        assert not gc.isenabled()
        raise ValueError("broke")
    assert gc.isenabled()


def test_pause_leaves_an_idle_collector_idle() -> None:
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def test_only_what_was_made_before_the_first_call_is_passed_over() -> None:
    """Cycles made by one run of a process are freed in the next, however many there are."""
    source = """
import gc, weakref
from kdrun.startup import collect_garbage

class Node:
    def __init__(self):
        self.itself = self

gc.disable()
collect_garbage()
kept = gc.get_freeze_count()
assert kept > 0 and gc.isenabled()
node = weakref.ref(Node())
collect_garbage()
assert gc.get_freeze_count() == kept
gc.collect()
assert node() is None
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def test_nothing_is_frozen_where_the_collector_runs_already() -> None:
    before = gc.get_freeze_count()
    collect_garbage()
    assert gc.get_freeze_count() == before
