from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from kdrun.data.images import Images
from kdrun.data.pixel_cache import cache_root
from kdrun.errors import UserError

PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def load(root):
    return Images(name=str(root), image_size=8, **PLAIN).load()


@pytest.mark.parametrize("name", ["images.npy", "target.npy", "about.json"])
@pytest.mark.parametrize("length", [None, 0, 100])
def test_what_is_torn_is_made_again(class_folders, capsys, name, length):
    before = load(class_folders)
    capsys.readouterr()
    for file in cache_root().glob(f"*/{name}"):
        whole = file.read_bytes()
        file.unlink()  # What is mapped must not shrink.
        if length is not None:
            file.write_bytes(whole[:length])
    after = load(class_folders)
    assert capsys.readouterr().out.count("is made again") == 2
    for part in before:
        assert torch.equal(before[part].inputs, after[part].inputs)
    load(class_folders)
    assert capsys.readouterr().out == ""


def test_a_full_disk_is_told_before_anything_is_written(class_folders, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10_000, 9_000, 1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="GiB left: set XDG_CACHE_HOME") as caught:
        load(class_folders)
    assert "\n" not in str(caught.value) and str(cache_root()) in str(caught.value)
    assert list(cache_root().iterdir()) == []


def test_a_split_is_not_decoded_again_when_another_changes(class_folders, capsys):
    load(class_folders)
    (class_folders / "test" / "cat" / "0.png").unlink()
    capsys.readouterr()
    load(class_folders)
    assert capsys.readouterr().out.splitlines() == [
        f"decoding 11 images, once; kept in {cache_root()}"
    ]
