"""Checkpoints and artefacts that are torn, bit-flipped, unwritable, or on a full disk."""

from __future__ import annotations

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
from kdrun.interruption import Stopped
from kdrun.store import Store
from kdrun.training_state import CHECKPOINT, PREVIOUS, read_checkpoint, write_checkpoint
from tests.tiny import StopAt, Training, identical


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


def test_gc_keeps_what_a_process_works_on(tmp_path: Path, capsys) -> None:
    def produce(directory: Path) -> None:
        (directory / CHECKPOINT).write_bytes(b"half")
        assert kdrun(["store", "gc", "--yes", f"output_dir={tmp_path}"]) == 0
        assert (directory / CHECKPOINT).exists()

    artefact, _ = Store(tmp_path / "store").obtain("teacher", {}, produce)
    assert f"{artefact.name}: kept, a process works on it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["rm"], ["ls", "verify"], ["ls", "--yes"], ["gc", "--force"], ["../x"]]
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
