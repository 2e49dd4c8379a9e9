"""Files that are torn, mislabelled, empty, huge, or no images at all: batches, or one line.

Every input comes from a seeded generator; a failure names its number.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.data.documents import TextFolder
from kdrun.data.images import Images
from kdrun.errors import UserError

PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def taken(module: Images) -> bool:
    """Whether a data set can be used; if not, it says so in one line. Batches must be sound."""
    try:
        module.prepare("paper")
        for loader in (
            module.train(batch_size=8, seed=0, device="cpu"),
            module.test(batch_size=8, device="cpu"),
        ):
            for batch in loader:
                assert torch.isfinite(batch.inputs).all()
                assert batch.target.min() >= 0 and batch.target.max() < module.num_classes
    except UserError as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1, str(error)
        return False
    return True


def header(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    """The beginning of a PNG file of that size, without its pixels."""
    facts = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunk = b"IHDR" + facts
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def damaged(data: bytes, dice: random.Random) -> bytes:
    """A file with something wrong with it, or quite another one."""
    kind = dice.randrange(9)
    if kind == 0:
        return data[: dice.randrange(len(data))]
    if kind in (1, 2):
        changed = bytearray(data)
        for _ in range(dice.randint(1, 8)):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        return bytes(changed)
    if kind == 3:
        place = dice.randrange(len(data))
        return data[:place] + dice.randbytes(dice.randrange(40)) + data[place:]
    sizes = [(100_000, 100_000), (0, 5), (1, 1), (2**31 - 1, 1), (20, 2**31 - 1)]
    others = {
        4: dice.randbytes(dice.randrange(300)),
        5: header(*dice.choice(sizes)) + data[33:],
        6: dice.choice(
            [b"GIF89a", b"RIFF\x10\0\0\0WEBPVP8 ", b"\xff\xd8\xff\xe0", b"BM", b"P6 9 9 "]
        )
        + dice.randbytes(50),
        7: dice.choice(
            [b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
        ),
        8: header(12, 12, dice.choice((1, 2, 4, 8, 16, 99)), dice.choice((0, 2, 3, 4, 6, 9)))
        + data[33:],
    }
    return others[kind]


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))]
)
def test_image_files(class_folders: Path, first: int) -> None:
    files = sorted(class_folders.rglob("*.png"))
    whole = {file: file.read_bytes() for file in files}
    plain = {"image_size": 8, "workers": 0, "cache": False}
    assert taken(Images(name=str(class_folders), **PLAIN | plain))
    refused = 0
    for seed in range(100 * first, 100 * (first + 1)):
        dice = random.Random(seed)
        file = dice.choice(files)
        file.write_bytes(damaged(whole[file], dice))
        storage = dice.choice(("resident", "stream"))
        options = {"storage": storage, **plain}
        try:
            refused += not taken(Images(name=str(class_folders), **PLAIN | options))
        except Exception as error:
            raise AssertionError(f"input {seed}: {file.read_bytes()!r:.300}") from error
        file.write_bytes(whole[file])
    assert refused > 30


@pytest.mark.parametrize(
    "make",
    [
        lambda root: (root / "train" / "cat" / "0.png").unlink(),
        lambda root: (root / "train" / "empty").mkdir(),
        lambda root: (root / "train" / "dog" / "x.png").mkdir(),
        lambda root: (root / "train" / "dog" / "loop.png").symlink_to("loop.png"),
        lambda root: (root / "train" / "cat" / "a").symlink_to(root / "train"),
        lambda root: (root / "train" / "cat" / "gone.png").symlink_to("/nowhere"),
        lambda root: (root / "test" / "cat").rename(root / "test" / "日本語 🙂"),
        lambda root: (root / "train" / "cat" / ("é" * 60 + ".png")).write_bytes(b""),
        lambda root: (root / "test" / "file.txt").write_text("beside the folders"),
        lambda root: (root / "test").rename(root / "valid"),
        lambda root: [path.unlink() for path in root.rglob("*.png")],
    ],
)
@pytest.mark.parametrize("storage", ["resident", "stream"])
def test_folders(class_folders: Path, make, storage: str) -> None:
    make(class_folders)
    options = {"storage": storage, "image_size": 8, "workers": 0, "cache": False}
    taken(Images(name=str(class_folders), **PLAIN | options))


def labels(dice: random.Random, count: int) -> list[Any]:
    """A column of classes with something wrong with it."""
    numbers = [number % 3 for number in range(count)]
    strange = dice.choice(
        [
            [None] * count,
            [-1, *numbers[1:]],
            [7, *numbers[1:]],
            [2**40, *numbers[1:]],
            [float("nan"), *map(float, numbers[1:])],
            [0.5] * count,
            [[number] for number in numbers],
            [{"a": number} for number in numbers],
            [str(number) for number in numbers],
            ["", *(["x"] * (count - 1))],
            [True, False] * (count // 2),
            ["🙂"] * count,
            numbers,
        ]
    )
    return strange


def noted(kind: str | None) -> dict[str, str] | None:
    """What the datasets library notes of the columns: images, and values of some kind."""
    if kind is None:
        return None
    features = {"img": {"_type": "Image"}, "kind": {"_type": "Value", "dtype": kind}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_parquet_files(hub_folder: Path, first: int) -> None:
    import pyarrow
    from pyarrow import parquet

    (path,) = hub_folder.rglob("train-*.parquet")
    whole = path.read_bytes()
    table = parquet.read_table(path)
    count = 30 if first == 0 else 150
    refused = 0
    for seed in range(1000 * first, 1000 * first + count):
        dice = random.Random(seed)
        kind = dice.randrange(4)
        if kind == 0:
            path.write_bytes(whole[: dice.randrange(len(whole))])
        elif kind == 1:
            changed = bytearray(whole)
            for _ in range(dice.randint(1, 6)):
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            path.write_bytes(bytes(changed))
        elif kind == 2:
            column = pyarrow.array(labels(dice, len(table)))
            known = {"double": "float64", "int64": "int64", "string": "string", "bool": "bool"}
            plain = table.set_column(1, "kind", column)
            note = noted(known.get(str(column.type)))
            parquet.write_table(plain.replace_schema_metadata(note), path)
        else:
            images = table.column("img").to_pylist()
            images[dice.randrange(len(images))] = dice.choice(
                [
                    None,
                    {"bytes": None, "path": None},
                    {"bytes": b"", "path": None},
                    {"bytes": None, "path": "/nowhere.png"},
                    {"bytes": damaged(images[0]["bytes"], dice), "path": None},
                ]
            )
            column = pyarrow.array(images, type=table.schema.field("img").type)
            parquet.write_table(
                table.set_column(0, "img", column).replace_schema_metadata(noted("int64")), path
            )
        options = {"name": "owner/animals", "image_column": "img", "label_column": "kind"}
        try:
            refused += not taken(Images(**PLAIN, **options, cache=False))
        except Exception as error:
            raise AssertionError(f"input {seed}, kind {kind}") from error
    assert count / 3 < refused < count


@pytest.mark.parametrize("seed", range(40))
def test_text_files(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    for number in range(dice.randint(0, 3)):
        content = dice.choice(
            [b"", b"\xff\xfe" + dice.randbytes(9), dice.randbytes(200), b"\0" * 50, b"text " * 99]
        )
        (tmp_path / f"{number}.txt").write_bytes(content)
    if dice.random() < 0.3:
        (tmp_path / "folder.txt").mkdir()
    try:
        documents = TextFolder(path=str(tmp_path)).load()["train"]
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert documents and all(isinstance(document.response, str) for document in documents)
