"""Artefacts: written whole or not at all, made once, refused when torn."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kdrun import distributed
from kdrun import store as store_module
from kdrun.artefacts import MARKER, commit, is_complete
from kdrun.errors import UserError
from kdrun.files import file_sha256, read_json, write_atomically, write_json
from kdrun.identity import fingerprint
from kdrun.interruption import SignalWatch, Stopped
from kdrun.store import Store, make_once


def write(text: str):
    def produce(directory: Path) -> None:
        (directory / "product.txt").write_text(text)

    return produce


# -- atomic files ----------------------------------------------------------------------------------


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "value.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call) -> None:
    path = tmp_path / "value.txt"
    write_atomically(path, "old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=r"cannot write .*value\.txt: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["value.txt"]


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "kdrun-test", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        write_atomically(disk / "last.ckpt", b"o" * 20_000)
        with pytest.raises(UserError, match="No space left on device"):
            write_atomically(disk / "last.ckpt", b"n" * 100_000)
        assert (disk / "last.ckpt").read_bytes() == b"o" * 20_000
        assert [file.name for file in disk.iterdir()] == ["last.ckpt"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_bytes(b"a" * 100_000)
    writer = multiprocessing.get_context("fork").Process(target=write_in_turn, args=(path, 200))
    writer.start()
    seen = set()
    while writer.is_alive():
        content = path.read_bytes()
        assert len(content) == 100_000 and len(set(content)) == 1
        seen.add(content[0])
    writer.join()
    assert writer.exitcode == 0
    assert len(seen) > 1, "the reader never met the writer"


def write_in_turn(path: Path, times: int) -> None:
    for number in range(times):
        write_atomically(path, bytes([65 + number % 2]) * 100_000)


def test_a_damaged_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"result\.json is damaged .*remove it and run again"):
        read_json(tmp_path / "result.json")


# -- fingerprints ----------------------------------------------------------------------------------


def test_fingerprints_ignore_order_and_notice_any_change() -> None:
    key = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert fingerprint(key) == fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert len(fingerprint(key)) == 16 and len(fingerprint(key, 8)) == 8
    others = [{**key, "a": 2}, {**key, "a": True}, {**key, "b": {"c": [2, 1], "d": None}}]
    assert len({fingerprint(other) for other in [key, *others]}) == 4


# -- made once -------------------------------------------------------------------------------------


def test_made_once_then_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, found = store.obtain("network", {"seed": 0}, write("made"))
    assert not found and first.path("product.txt").read_text() == "made"
    again, found = store.obtain("network", {"seed": 0}, write("made again"))
    assert found and again == first
    assert again.path("product.txt").read_text() == "made"
    other, found = store.obtain("network", {"seed": 1}, write("other"))
    assert not found and other.directory != first.directory
    assert first.name == f"network/{fingerprint({'seed': 0})}"


def test_the_marker_tells_what_was_made(tmp_path: Path) -> None:
    artefact, _ = Store(tmp_path).obtain("network", {"seed": 0}, write("made"))
    marker = read_json(artefact.path(MARKER))
    assert marker["key"] == {"seed": 0}
    digest = file_sha256(artefact.path("product.txt"))
    assert marker["files"] == {"product.txt": {"bytes": 4, "sha256": digest}}


def test_a_failed_attempt_is_not_complete_and_goes_on_from_its_files(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(directory: Path) -> None:
        (directory / "half.txt").write_text("half")
        (directory / ".last.ckpt.4242.tmp").write_text("torn")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        store.obtain("network", {}, fail)

    def go_on(directory: Path) -> None:
        assert sorted(file.name for file in directory.iterdir()) == ["half.txt"]
        (directory / "whole.txt").write_text("whole")

    artefact, found = store.obtain("network", {}, go_on)
    assert not found and is_complete(artefact.directory)


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_torn_artefact_is_refused(tmp_path: Path, damage: str) -> None:
    artefact, _ = Store(tmp_path).obtain("network", {}, write("weights"))
    product = artefact.path("product.txt")
    if damage == "missing":
        product.unlink()
    else:
        product.write_text("weig" if damage == "truncated" else "weighss")
    with pytest.raises(UserError, match=r"product\.txt is missing or not what was written; remove"):
        Store(tmp_path).obtain("network", {}, write("weights"))


def test_a_torn_marker_is_refused(tmp_path: Path) -> None:
    artefact, _ = Store(tmp_path).obtain("network", {}, write("weights"))
    marker = artefact.path(MARKER)
    marker.write_text(marker.read_text()[:20])
    with pytest.raises(UserError, match=r"artefact\.json is damaged"):
        Store(tmp_path).obtain("network", {}, write("weights"))


def test_logs_may_grow_and_go(tmp_path: Path) -> None:
    (tmp_path / "logs" / "wandb").mkdir(parents=True)
    for name in ("log.txt", "logs/wandb/run.wandb", "result.json"):
        (tmp_path / name).write_text("x")
    commit(tmp_path, {})
    assert list(json.loads((tmp_path / MARKER).read_text())["files"]) == ["result.json"]
    (tmp_path / "logs" / "wandb" / "run.wandb").unlink()
    (tmp_path / "log.txt").write_text("longer")
    assert is_complete(tmp_path)


def test_afresh_throws_the_old_one_away(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    make_once(directory, {}, write("old"))
    (directory / "last.ckpt").write_text("state")
    _, found = make_once(directory, {}, write("new"), afresh=True)
    assert not found
    assert sorted(file.name for file in directory.iterdir()) == [MARKER, "product.txt"]
    assert (directory / "product.txt").read_text() == "new"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot make .*file/network: Not a directory"):
        Store(tmp_path / "file").obtain("network", {}, write("x"))


# -- several processes -----------------------------------------------------------------------------


def slow_producer(root: Path, said: Path, started: Path, release: Path) -> None:
    """Obtain an artefact; whoever makes it notes so, and takes until ``release`` exists."""

    def say(text: str) -> None:
        said.write_text(text)

    def produce(directory: Path) -> None:
        with started.open("a") as file:
            file.write("made\n")
        while not release.exists():
            time.sleep(0.01)
        (directory / "product.txt").write_text("made")

    artefact, _ = Store(root, say).obtain("network", {}, produce)
    assert artefact.path("product.txt").read_text() == "made"


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_processes_at_once_make_it_once(tmp_path: Path, method: str) -> None:
    started, release = tmp_path / "started", tmp_path / "release"
    said = [tmp_path / "said0", tmp_path / "said1"]
    context = multiprocessing.get_context(method)
    processes = [
        context.Process(target=slow_producer, args=(tmp_path / "store", path, started, release))
        for path in said
    ]
    for process in processes:
        process.start()
    until(lambda: started.exists() and any(path.exists() for path in said))
    release.touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert started.read_text() == "made\n"
    (waiter,) = (path for path in said if path.exists())
    assert "waiting for another run that works on this network (" in waiter.read_text()


def test_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    started = tmp_path / "started"
    arguments = (tmp_path / "store", tmp_path / "said", started, tmp_path / "never")
    process = multiprocessing.get_context("fork").Process(target=slow_producer, args=arguments)
    process.start()
    until(started.exists)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _, found = Store(tmp_path / "store").obtain("network", {}, write("made after all"))
    assert not found


def test_waiting_ends_with_a_signal(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store_module, "WAIT_SECONDS", 0.02)
    started, release = tmp_path / "started", tmp_path / "release"
    arguments = (tmp_path / "store", tmp_path / "said", started, release)
    process = multiprocessing.get_context("fork").Process(target=slow_producer, args=arguments)
    process.start()
    until(started.exists)
    with SignalWatch() as watch:
        waiting = Store(
            tmp_path / "store",
            lambda text: os.kill(os.getpid(), signal.SIGTERM),
            watch.raise_if_received,
        )
        with pytest.raises(Stopped) as stopped:
            waiting.obtain("network", {}, write("not by us"))
    assert stopped.value.signal_number == signal.SIGTERM
    release.touch()
    process.join(30)
    assert process.exitcode == 0


def test_ranks_wait_together(tmp_path: Path, monkeypatch) -> None:
    """Rank 1 hears of each look at the lock: a process group gives up on ranks that are silent."""
    heard = iter([False, False, True])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "broadcast", lambda _: next(heard))
    place = tmp_path / "store" / "network" / "0123"
    assert store_module._acquire(place, "network", pytest.fail, pytest.fail) is None
    assert not list(heard) and not list(tmp_path.iterdir())
