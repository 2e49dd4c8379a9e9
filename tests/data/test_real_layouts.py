"""``imagenet`` and ``tiny_imagenet`` on miniatures in the layouts of the real sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdrun.build import instantiate
from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.data.images import Images
from kdrun.errors import UserError
from tests.miniatures import write_folders, write_parquet

CLASSES = ["n01440764", "n01443537", "n01484850"]
NAMES = {"imagenet": "ILSVRC/imagenet-1k", "tiny_imagenet": "zh-plus/tiny-imagenet"}
TEST_SPLITS = {"imagenet": "validation", "tiny_imagenet": "valid"}
SIDES = {"imagenet": 224, "tiny_imagenet": 64}
SIZES = {"imagenet": [(300, 260), (240, 320)], "tiny_imagenet": [(64, 64)]}

each_set = pytest.mark.parametrize("name", NAMES)


def dataset(name: str, *words: str) -> Images:
    """The data set as the command line builds it, with a quarter of train held out."""
    words = (f"dataset={name}", "dataset.val_fraction=0.25", *words)
    node = compose(words, open_catalogue()).values["dataset"]
    return instantiate(node | {"workers": 0})


def prepared(name: str, *words: str) -> Images:
    module = dataset(name, *words)
    module.prepare("holdout")
    return module


def refusal(name: str, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        prepared(name, *words)
    return one_line(caught)


def one_line(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def parquet(tmp_path, monkeypatch, hub_cache):
    """Writes a set in the hub's layout below ``KDRUN_DATA``; returns its files."""
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path / "data"))

    def write(name: str, **changes) -> list[Path]:
        splits = {"train": 12, TEST_SPLITS[name]: 6}
        return write_parquet(
            tmp_path / "data" / NAMES[name],
            changes.get("splits", splits),
            columns=("image", "label"),
            class_names=CLASSES,
            sizes=SIZES[name],
        )

    return write


@pytest.fixture
def folders(tmp_path):
    """Writes a set in the layout of the unpacked archives; returns its folder."""

    def write(name: str, **changes) -> Path:
        splits = changes.get("splits", {"train": 4, "val": 2})
        write_folders(tmp_path / "raw", splits, class_names=CLASSES, sizes=SIZES[name])
        return tmp_path / "raw"

    return write


def assert_is_read(name: str, module: Images) -> None:
    """Every split gives inputs of the right size, with the classes in turn."""
    assert module.class_names == CLASSES and module.num_classes == 3
    assert module.input_shape == (3, SIDES[name], SIDES[name])
    assert (module.train_size, module.validation_size, module.test_size) == (9, 3, 6)
    parts = {
        "train": module.train(batch_size=4, seed=0, device="cpu"),
        "validation": module.validation(batch_size=4, device="cpu"),
        "test": module.test(batch_size=4, device="cpu"),
    }
    for part, loader in parts.items():
        batches = list(loader)
        for batch in batches:
            assert batch.inputs.shape[1:] == module.input_shape
            assert torch.isfinite(batch.inputs).all()
        targets = torch.cat([batch.target for batch in batches])
        assert targets.bincount().tolist() == [len(targets) // 3] * 3, part


@each_set
def test_the_hubs_layout(name, parquet):
    parquet(name)
    assert_is_read(name, prepared(name))


@each_set
def test_unpacked_folders(name, folders):
    root = folders(name)
    words = (f"dataset.name={root}", "dataset.test_split=val")
    assert_is_read(name, prepared(name, *words))


def test_images_may_lie_deeper_in_their_class(folders):
    """As in Tiny ImageNet's archive: ``train/<class>/images/<image>``."""
    root = folders("tiny_imagenet")
    for folder in root.glob("*/*"):
        pictures = list(folder.iterdir())
        (folder / "images").mkdir()
        for picture in pictures:
            picture.rename(folder / "images" / picture.name)
    words = (f"dataset.name={root}", "dataset.test_split=val")
    assert_is_read("tiny_imagenet", prepared("tiny_imagenet", *words))


# -- what goes wrong, in one line ------------------------------------------------------------------


def one_pass(module: Images) -> None:
    for loader in (
        module.train(batch_size=4, seed=0, device="cpu"),
        module.validation(batch_size=4, device="cpu"),
        module.test(batch_size=4, device="cpu"),
    ):
        list(loader)


@each_set
def test_a_corrupt_image_in_a_folder(name, folders):
    root = folders(name)
    broken = root / "val" / CLASSES[1] / "1.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError) as caught:
        one_pass(prepared(name, f"dataset.name={root}", "dataset.test_split=val"))
    assert one_line(caught).startswith(f"cannot decode {broken}: ")


@each_set
def test_a_corrupt_image_in_a_table(name, parquet, hub_cache):
    train, _ = parquet(name)
    rows = hub_cache.Dataset.from_parquet(str(train)).cast_column(
        "image", hub_cache.Image(decode=False)
    )
    rows = rows.map(
        lambda row, n: {"image": {"bytes": b"no image", "path": None}} if n == 5 else row,
        with_indices=True,
    )
    rows.to_parquet(train)
    with pytest.raises(UserError) as caught:
        one_pass(prepared(name))
    assert one_line(caught) == f"cannot decode {train}, row 5: not a known image"


@each_set
def test_a_torn_table(name, parquet):
    _, test = parquet(name)
    test.write_bytes(test.read_bytes()[:-40])
    assert refusal(name).startswith(f"cannot read {test}: ")


@each_set
def test_a_missing_split(name, parquet):
    train, test = parquet(name)
    test.unlink()
    message = refusal(name)
    split = TEST_SPLITS[name]
    assert message == f"{train.parents[1]} has no split '{split}'; it has train"


@each_set
def test_a_missing_folder_of_a_split(name, folders):
    root = folders(name)
    message = refusal(name, f"dataset.name={root}", "dataset.test_split=test")
    assert message == f"{root} has no split 'test'; it has train, val"


def test_a_split_that_is_one_heap_of_images(folders):
    """As ImageNet's archive of validation images, whose classes stand in another one."""
    root = folders("tiny_imagenet")
    for folder in (root / "val").iterdir():
        for picture in folder.iterdir():
            picture.rename(root / "val" / f"{folder.name}-{picture.name}")
        folder.rmdir()
    message = refusal("tiny_imagenet", f"dataset.name={root}", "dataset.test_split=val")
    assert message.startswith(f"{root / 'val'} has no class folders")


def test_the_archive_of_tiny_imagenet(folders):
    """The classes of ``val/images`` stand in a text file; ``test`` has none."""
    root = folders("tiny_imagenet")
    (root / "val" / "images").mkdir()
    lines = []
    for kind in reversed(CLASSES):
        for number in range(2):
            name = f"val_{len(lines)}.JPEG"
            (root / "val" / kind / f"{number}.JPEG").rename(root / "val" / "images" / name)
            lines.append(f"{name}\t{kind}\t0\t32\t44\t62\n")
        (root / "val" / kind).rmdir()
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("".join(lines))
    words = (f"dataset.name={root}", "dataset.test_split=val")
    module = prepared("tiny_imagenet", *words)
    assert_is_read("tiny_imagenet", module)
    (batch,) = module.test(batch_size=6, device="cpu")
    assert batch.target.tolist() == [2, 2, 1, 1, 0, 0]
    annotations.write_text("".join(lines)[:-20] + "\nval_6.JPEG")
    message = refusal("tiny_imagenet", *words)
    assert message == f"{annotations}, line 7: no image and class divided by a tab"
    annotations.write_text("".join(lines) + f"gone.JPEG\t{CLASSES[0]}\n")
    message = refusal("tiny_imagenet", *words)
    assert message == f"cannot read {root / 'val/images/gone.JPEG'}: No such file or directory"


@each_set
def test_a_wrong_path(name, parquet, tmp_path):
    parquet(name)
    wrong = tmp_path / "nowhere"
    message = refusal(name, f"dataset.name={wrong}")
    assert message == f"dataset.name={wrong}: there is no such folder"


@each_set
def test_nothing_below_the_data_folder(name, tmp_path, monkeypatch, hub_cache):
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path))
    message = refusal(name)
    assert message.startswith(f"dataset.name={NAMES[name]}: not below KDRUN_DATA={tmp_path}, and ")
