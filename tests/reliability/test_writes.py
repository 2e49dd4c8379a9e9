"""Checkpoints and artefacts that are torn, bit-flipped, unwritable, or on a full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdrun.artefacts import MARKER
from kdrun.cli import run as kdrun
from kdrun.errors import UserError
from kdrun.files import write_json
from kdrun.identity import identity
from kdrun.interruption import Stopped
from kdrun.stages.train import Supervised
from kdrun.store import Store
from kdrun.store_command import read_size
from kdrun.training_state import (
    CHECKPOINT,
    PREVIOUS,
    previous_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from tests.tiny import WORDS, StopAt, Training, composed, identical, run


def state(number: int) -> dict:
    return {"key": "k", "number": number, "weights": torch.full((2000,), float(number))}


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_is_still_a_plain_pytorch_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / CHECKPOINT, state(1))
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["number"] == 1
    assert read_checkpoint(tmp_path / CHECKPOINT, "k")["number"] == 1
    assert os.listdir(tmp_path) == [CHECKPOINT]


def test_any_flipped_bit_and_any_torn_end_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    write_checkpoint(path, state(1))
    whole = path.read_bytes()
    draw = random.Random(0)
    places = [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(100))]
    for place in places:
        path.write_bytes(whole)
        flip(path, place, draw.randrange(8))
        with pytest.raises(UserError, match=r"cannot read the checkpoint .*last\.ckpt \("):
            read_checkpoint(path, "k")
    for length in [0, 1, 10, *(draw.randrange(len(whole)) for _ in range(30)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="remove it to start this training again"):
            read_checkpoint(path, "k")


@pytest.mark.parametrize("damage", ["flipped", "torn", "missing"])
def test_the_previous_checkpoint_stands_in(tmp_path: Path, damage: str) -> None:
    path, said = tmp_path / CHECKPOINT, []
    for number in (1, 2, 3):
        write_checkpoint(path, state(number))
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, PREVIOUS]
    assert read_checkpoint(path, "k", said.append)["number"] == 3 and not said
    if damage == "flipped":
        flip(path, 3000)
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.unlink()
    assert read_checkpoint(path, "k", said.append)["number"] == 2
    assert len(said) == (damage != "missing")
    assert all("is damaged (" in line and "going on from previous.ckpt" in line for line in said)
    with pytest.raises(UserError, match="belongs to another configuration"):
        read_checkpoint(path, "other", said.append)


def test_going_on_from_the_previous_one_gives_the_same_weights(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole", epochs=2).trained()
    stopped = Training(tmp_path / "run", epochs=2)
    with pytest.raises(Stopped):
        stopped.run(StopAt(22))
    flip(tmp_path / "run" / CHECKPOINT, 2000)
    resumed = Training(tmp_path / "run", epochs=2)
    assert identical(resumed.trained(), whole)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "going on from previous.ckpt beside it" in log
    assert "continuing at epoch 2 of 2, step 0 of 18" in log
    assert not (tmp_path / "run" / PREVIOUS).exists(), "it is of no use after training"


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [9, 8]), (4, [9, 8, 7, 6])])
def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path: Path, keep: int, kept) -> None:
    path, said = tmp_path / CHECKPOINT, []
    for number in range(10):
        write_checkpoint(path, state(number), keep)
    assert len(os.listdir(tmp_path)) == keep
    for number in kept:
        assert read_checkpoint(path, "k", said.append)["number"] == number
        newest = next(p for p in [path, *previous_checkpoints(path)] if p.stat().st_size > 1)
        newest.write_bytes(b"x")
    with pytest.raises(UserError, match="remove it to start this training again"):
        read_checkpoint(path, "k", said.append)


def test_keeping_fewer_throws_the_older_ones_away(tmp_path: Path) -> None:
    for number in range(5):
        write_checkpoint(tmp_path / CHECKPOINT, state(number), keep=4)
    write_checkpoint(tmp_path / CHECKPOINT, state(5), keep=2)
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, PREVIOUS]


def test_checkpoints_while_training_lasts_and_after(tmp_path: Path) -> None:
    seen = []

    class Looking(Supervised):
        def after_step(self, progress) -> None:
            seen.append(len(list(tmp_path.glob("*.ckpt"))))

    training = Training(tmp_path, method=Looking, epochs=6, batches=2, keep_last=3)
    training.run()
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [CHECKPOINT]


def test_how_many_are_kept_does_not_name_another_run() -> None:
    first, second = (identity(composed(f"trainer.keep_last={n}").values) for n in (1, 5))
    permitted = identity(composed("teacher.allow_other_data=true").values)
    assert first == second == permitted == identity(composed().values)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_at_any_moment_of_writing_leaves_a_checkpoint(tmp_path, monkeypatch, call) -> None:
    """A disk that fills up, or breaks, at each call that writing makes."""
    path = tmp_path / CHECKPOINT
    for failing in range(4):
        for name in os.listdir(tmp_path):
            (tmp_path / name).unlink()
        for number in (1, 2):
            write_checkpoint(path, state(number))
        real, calls = getattr(os, call), []

        def fail(*arguments, real=real, calls=calls, failing=failing):
            calls.append(arguments)
            if len(calls) - 1 == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        monkeypatch.setattr(os, call, fail)
        try:
            write_checkpoint(path, state(3))
        except UserError as error:
            assert "No space left on device" in str(error)
        monkeypatch.undo()
        found = read_checkpoint(path, "k", lambda line: None)
        assert found["number"] in (2, 3)
        assert not list(tmp_path.glob(".*.tmp"))


def test_a_result_that_is_torn_or_flipped_is_refused_and_kept(tmp_path: Path, capsys) -> None:
    words = ["method=ls", "recipe.stages.alone=null", "teacher.allow_chance=true"]
    result, directory = run(tmp_path, *words)
    path = directory / "result.json"
    whole = path.read_bytes()
    command = [*WORDS, f"output_dir={tmp_path}", *words]
    place = whole.index(b'"accuracy": ') + len(b'"accuracy": ')
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    assert json.loads(flipped) != json.loads(whole)
    for damaged in (whole[: len(whole) // 2], b"", flipped):
        path.write_bytes(damaged)
        assert kdrun(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "result.json is missing or not what was written" in error
        assert path.read_bytes() == damaged, "nothing is written over it"
    path.write_bytes(whole)
    assert kdrun(command) == 0
    assert kdrun(["report", str(directory)]) == 0
    capsys.readouterr()
    path.write_bytes(whole[:100])
    assert kdrun(["report", str(directory)]) == 2
    assert "result.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "env.json"])
def test_a_run_with_a_damaged_file_is_one_line(tmp_path: Path, capsys, name: str) -> None:
    words = ["method=ls", "recipe.stages.alone=null", "teacher.allow_chance=true"]
    _, directory = run(tmp_path, *words)
    path, place = directory / name, str(directory)
    whole = path.read_text()
    commands = {
        "config.yaml": (["eval", place], ["export", place], ["resume", place]),
        "result.json": (["eval", place], ["export", place], ["report", place]),
        "env.json": (["resume", place],),
    }[name]
    for damaged in ("", "[]", "null", "3", '"x"', "x: [", "{}", whole[: len(whole) // 2]):
        path.write_text(damaged)
        for command in commands:
            assert kdrun(command) == 2, (command, damaged)
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and place in error, (command, damaged, error)
        if damaged != "{}" and name != "env.json":
            assert kdrun(["diff", place, place]) == 2, damaged
            assert f"{path} is " in capsys.readouterr().err
        assert path.read_text() == damaged, "nothing is written over it"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "kdrun-test", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_checkpoint_that_was_there(small_disk: Path) -> None:
    path = small_disk / CHECKPOINT
    write_checkpoint(path, state(1))
    large = state(2) | {"weights": torch.zeros(100_000)}
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: No space left on device"):
        write_checkpoint(path, large)
    assert read_checkpoint(path, "k")["number"] == 1
    assert os.listdir(small_disk) == [CHECKPOINT]


def test_training_on_a_full_disk_ends_with_one_line(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(245_000))
    with pytest.raises(UserError, match=r"^cannot write .*: No space left on device$"):
        Training(small_disk / "run", epochs=1, batches=2).run()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only directories")
def test_a_read_only_directory_is_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / CHECKPOINT, state(1))
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        write_checkpoint(tmp_path / CHECKPOINT, state(2))
    tmp_path.chmod(0o700)
    assert read_checkpoint(tmp_path / CHECKPOINT, "k")["number"] == 1


def test_a_read_only_file_system_is_one_line(small_disk: Path) -> None:
    path = small_disk / CHECKPOINT
    write_checkpoint(path, state(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        write_checkpoint(path, state(2))
    with pytest.raises(UserError, match="Read-only file system"):
        Store(small_disk / "store").obtain("teacher", {}, lambda directory: None)
    assert read_checkpoint(path, "k")["number"] == 1


# -- the store -------------------------------------------------------------------------------------


def fill(root: Path) -> dict[str, str]:
    """Two teachers, of which a run uses one, by way of a recording made from it; one unfinished."""
    store = Store(root / "store")

    def produce(directory: Path) -> None:
        (directory / "network.safetensors").write_bytes(b"weights" * 10)

    used, _ = store.obtain("teacher", {"seed": 0}, produce)
    unused, _ = store.obtain("teacher", {"seed": 1}, produce)
    recording, _ = store.obtain("recording", {"of": used.name}, produce)
    half = root / "store" / "alone" / "0123456789abcdef"
    half.mkdir(parents=True)
    (half / CHECKPOINT).write_bytes(b"half")
    run = root / "digits" / "a-b" / "kd-00000000" / "seed0"
    run.mkdir(parents=True)
    write_json(run / "artefacts.json", {"recording": recording.name})
    return {"used": used.name, "unused": unused.name, "recording": recording.name}


def test_store_ls_verify_and_gc(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = fill(tmp_path)
    place = f"output_dir={tmp_path}"
    assert kdrun(["store", "ls", place]) == 0
    listed = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert (listed[names["used"]], listed[names["unused"]]) == ("1", "0")
    assert kdrun(["store", "verify", place]) == 0
    assert "DAMAGED" not in capsys.readouterr().out

    flip(tmp_path / "store" / names["used"] / "network.safetensors", 12)
    assert kdrun(["store", "verify", place]) == 1
    out = capsys.readouterr().out
    assert f"{names['used']}: DAMAGED: network.safetensors" in out and out.count("DAMAGED") == 1

    assert kdrun(["store", "gc", place]) == 0
    out = capsys.readouterr().out
    assert f"{names['unused']}: would be removed, no run refers to it" in out
    assert "alone/0123456789abcdef: would be removed, unfinished" in out
    assert names["used"] not in out and names["recording"] not in out
    assert (tmp_path / "store" / names["unused"] / MARKER).exists()

    assert kdrun(["store", "gc", "--yes", place]) == 0
    left = {str(p.parent.relative_to(tmp_path / "store")) for p in tmp_path.rglob(MARKER)}
    assert left == {names["used"], names["recording"]}
    assert not (tmp_path / "store" / "alone" / "0123456789abcdef").exists()


TORN = ["", '{"key": {', "null", "[]", "{}", '{"key": {}, "files": {"network.safetensors": 1}}']


@pytest.mark.parametrize("text", TORN)
def test_a_damaged_marker_hides_nothing_else(tmp_path: Path, capsys, text: str) -> None:
    names = fill(tmp_path)
    place = f"output_dir={tmp_path}"
    marker = tmp_path / "store" / names["unused"] / MARKER
    marker.write_text(text)
    assert kdrun(["store", "ls", place]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:5]} > set(names.values())
    assert len(lines) == 6 and lines[5].startswith(f"{marker} is damaged (")
    assert kdrun(["store", "verify", place]) == 1
    out = capsys.readouterr().out
    assert f"{names['unused']}: DAMAGED: {MARKER}" in out and f"{names['used']}: sound" in out
    # No run refers to it.
    assert kdrun(["store", "gc", "--yes", place]) == 0
    assert f"{marker} is damaged" in capsys.readouterr().out
    assert not marker.exists() and (tmp_path / "store" / names["used"] / MARKER).exists()


@pytest.mark.parametrize("torn", ["marker", "run"])
def test_gc_keeps_what_a_damaged_file_may_refer_to(tmp_path: Path, capsys, torn: str) -> None:
    names = fill(tmp_path)
    run = tmp_path / "digits" / "a-b" / "kd-00000000" / "seed0"
    path = tmp_path / "store" / names["recording"] / MARKER
    path = path if torn == "marker" else run / "artefacts.json"
    path.write_text("[]")
    assert kdrun(["store", "gc", "--yes", f"output_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert all((tmp_path / "store" / name / MARKER).exists() for name in names.values())
    assert f"{names['unused']}: kept, who needs it stands in {path}, which is damaged" in out
    assert "alone/0123456789abcdef: removed, unfinished" in out


def test_a_run_behind_a_link_keeps_what_it_refers_to(tmp_path: Path, capsys) -> None:
    names = fill(tmp_path / "outputs")
    (tmp_path / "outputs" / "digits").rename(tmp_path / "large")
    (tmp_path / "outputs" / "digits").symlink_to(tmp_path / "large")
    assert kdrun(["store", "gc", "--yes", f"output_dir={tmp_path}/outputs"]) == 0
    assert (tmp_path / "outputs" / "store" / names["used"] / MARKER).exists()
    assert not (tmp_path / "outputs" / "store" / names["unused"]).exists()


def test_gc_keeps_what_a_process_works_on(tmp_path: Path, capsys) -> None:
    def produce(directory: Path) -> None:
        (directory / CHECKPOINT).write_bytes(b"half")
        assert kdrun(["store", "gc", "--yes", f"output_dir={tmp_path}"]) == 0
        assert (directory / CHECKPOINT).exists()

    artefact, _ = Store(tmp_path / "store").obtain("teacher", {}, produce)
    assert f"{artefact.name}: kept, a process works on it" in capsys.readouterr().out


def teachers(root: Path, *runs: str) -> list[str]:
    """A teacher of 100 kB for each run; ``done`` runs have a result, others have not."""
    store, names = Store(root / "store"), []
    for number, kind in enumerate(runs):
        artefact, _ = store.obtain(
            "teacher", {"seed": number}, lambda d: (d / "weights").write_bytes(bytes(100_000))
        )
        for path in artefact.directory.iterdir():
            os.utime(path, (number, number))
        names.append(artefact.name)
        run = root / "digits" / "a-b" / f"kd-{number}" / "seed0"
        run.mkdir(parents=True)
        write_json(run / "artefacts.json", {"teacher": artefact.name})
        if kind == "done":
            write_json(run / MARKER, {"key": {}, "files": {}})
    return names


def left_of(root: Path) -> set[str]:
    return {
        str(path.parent.relative_to(root / "store")) for path in root.glob("store/*/*/" + MARKER)
    }


def test_a_budget_removes_what_was_used_longest_ago(tmp_path: Path, capsys) -> None:
    names = teachers(tmp_path, "done", "open", "done", "done", "done")
    place = f"output_dir={tmp_path}"
    # Found in the store and used by a run: now the latest.
    Store(tmp_path / "store").obtain("teacher", {"seed": 2}, lambda directory: None)
    assert kdrun(["store", "gc", "--budget", "350kB", place]) == 0
    out = capsys.readouterr().out
    assert f"{names[0]}: would be removed, last used 1970-01-01" in out
    assert f"{names[3]}: would be removed" in out and out.count("would be removed") == 2
    assert left_of(tmp_path) == set(names), "without --yes nothing goes"
    assert kdrun(["store", "gc", "--yes", "--budget=350kB", place]) == 0
    assert left_of(tmp_path) == {names[1], names[2], names[4]}
    capsys.readouterr()
    assert kdrun(["store", "gc", "--yes", "--budget", "10kB", place]) == 0
    assert left_of(tmp_path) == {names[1]}, "its run is not finished"
    assert "stay, above the budget: runs that are not finished need them" in capsys.readouterr().out
    assert kdrun(["store", "gc", "--yes", "--budget", "1GB", place]) == 0
    assert left_of(tmp_path) == {names[1]}


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("1.5TiB", 1.5 * 2**40), ("500M", 5 * 10**8), ("7", 7), ("2 kib", 2048)],
)
def test_sizes(text: str, size: float) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1GB", "1XB", "GB", "nan", "1e9"])
def test_what_is_no_size_is_one_line(text: str, capsys) -> None:
    assert kdrun(["store", "gc", f"--budget={text}"]) == 2
    assert "not a size; write it as 20GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["ls", "--budget", "1GB"],
        [],
        ["rm"],
        ["ls", "verify"],
        ["ls", "--yes"],
        ["gc", "--force"],
        ["../x"],
    ],
)
def test_words_that_make_no_sense_are_one_line(words, capsys) -> None:
    assert kdrun(["store", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "kdrun store ls|verify|gc" in error


def test_a_flipped_bit_in_a_shared_teacher_is_noticed_on_use(tmp_path: Path) -> None:
    names = fill(tmp_path)
    path = tmp_path / "store" / names["used"] / "network.safetensors"
    flip(path, 12)
    with pytest.raises(UserError, match=r"network\.safetensors is missing or not what was written"):
        Store(tmp_path / "store").obtain("teacher", {"seed": 0}, lambda directory: None)
