"""Who holds a lock, and what is said of holders that are no more."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from kdrun.errors import UserError
from kdrun.locks import Lock
from kdrun.store import Store


def note(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def hold(path: Path, held: Path) -> None:
    lock = Lock(path)
    assert lock.acquire()
    held.touch()
    time.sleep(60)


@pytest.fixture
def other(tmp_path: Path):
    """A process that holds the lock ``tmp_path / "lock"``."""
    held = tmp_path / "held"
    process = multiprocessing.get_context("fork").Process(
        target=hold, args=(tmp_path / "lock", held)
    )
    process.start()
    end = time.monotonic() + 30
    while not held.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_holder_is_known_by_machine_and_process(tmp_path: Path, other) -> None:
    lock = Lock(tmp_path / "lock")
    assert not lock.acquire() and lock.is_held()
    holder = lock.holder()
    assert (holder.host, holder.pid) == (socket.gethostname(), other.pid)
    assert abs(holder.since - time.time()) < 60 and not holder.is_gone
    assert lock.told().startswith(f"process {other.pid} on {socket.gethostname()} since 20")
    assert "remove" not in lock.told()


def test_a_note_that_was_not_finished_is_removed(tmp_path: Path) -> None:
    unfinished = tmp_path / ".lock.holder.4711.tmp"
    another = tmp_path / ".lock2.holder.4711.tmp"
    for path in (unfinished, another):
        path.write_text("{")
    lock = Lock(tmp_path / "lock")
    assert lock.acquire()
    assert not unfinished.exists() and another.exists()
    assert lock.holder().pid == os.getpid()
    lock.release()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, other) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    lock = Lock(tmp_path / "lock")
    assert lock.holder().is_gone, "its note is still there"
    assert not lock.is_held()
    assert lock.acquire() and lock.holder().pid == os.getpid()
    lock.release()
    assert lock.holder() is None and not note(tmp_path / "lock").exists()


def test_looking_leaves_no_note(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    assert not lock.is_held() and lock.told() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_machine_that_is_down(tmp_path: Path, other) -> None:
    """As on a shared file system whose server still keeps the lock."""
    lock = Lock(tmp_path / "lock")
    told = {"host": "node17", "pid": 1, "since": 0.0}
    note(tmp_path / "lock").write_text(json.dumps(told))
    assert "process 1 on node17 since 19" in lock.told()
    assert lock.told().endswith(f"; if that machine is down, remove {tmp_path / 'lock'}")
    assert not lock.holder().is_gone, "nobody here can know"
    # What it says helps: whoever comes next has a lock of its own.
    (tmp_path / "lock").unlink()
    assert lock.acquire()
    lock.release()


def test_a_process_that_is_gone_while_the_lock_is_held(tmp_path: Path, other) -> None:
    """By one that it has started, or by a file server that has not noticed."""
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    told = {"host": socket.gethostname(), "pid": dead.pid, "since": time.time()}
    note(tmp_path / "lock").write_text(json.dumps(told))
    lock = Lock(tmp_path / "lock")
    assert f"process {dead.pid} on" in lock.told() and "which has ended" in lock.told()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}', '"x"'])
def test_a_torn_note_says_nothing(tmp_path: Path, content: str) -> None:
    note(tmp_path / "lock").write_text(content)
    assert Lock(tmp_path / "lock").told() == ""


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch) -> None:
    import fcntl

    def missing(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(UserError, match=r"^cannot lock .*lock: Operation not supported$"):
        Lock(tmp_path / "lock").acquire()


def test_who_waits_is_told_for_whom(tmp_path: Path, other) -> None:
    class Enough(Exception):
        pass

    def enough() -> None:
        raise Enough

    store, said = Store(tmp_path / "store"), []
    artefact, _ = store.obtain("network", {}, lambda directory: None)
    path = artefact.directory.with_name(f".{artefact.directory.name}.lock")
    path.unlink()
    os.link(tmp_path / "lock", path)
    note(tmp_path / "lock").rename(note(path))
    with pytest.raises(Enough):
        Store(tmp_path / "store", said.append, enough).obtain("network", {}, lambda d: None)
    assert len(said) == 1
    assert said[0].startswith("waiting for another run that works on this network (")
    assert f": process {other.pid} on {socket.gethostname()} since" in said[0]
