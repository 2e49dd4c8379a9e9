from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdrun.data.class_folders import open_folder
from kdrun.data.decode import decode
from kdrun.data.images import Images
from kdrun.data.sources import content_of, data_files, data_folder
from kdrun.errors import UserError

PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def animals(**options) -> Images:
    defaults = {"name": "owner/animals", "image_column": "img", "label_column": "kind"}
    return Images(**PLAIN | defaults | options)


def names(folder: Path) -> list[str]:
    return [str(Path(file.path).relative_to(folder)) for file in data_files(folder)]


def test_files_come_in_order_and_hidden_ones_do_not(tmp_path):
    root = tmp_path / ".data"  # That the folder itself is hidden hides nothing in it.
    for name in ("b/2", "b/10", "a", "b-c/x", ".git/objects/ab/cd", "b/.cache", ".hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    assert names(root) == ["a", "b/10", "b/2", "b-c/x"]
    before = content_of(data_files(root), root)
    (root / ".git" / "more").write_text("")
    assert content_of(data_files(root), root) == before
    (root / "b" / "2").write_text("longer")
    assert content_of(data_files(root), root) != before


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "train.parquet").write_text("x")
    root = tmp_path / "set"
    (root / "deep").mkdir(parents=True)
    (root / "data").symlink_to(tmp_path / "disk")
    assert names(root) == ["data/train.parquet"]
    (root / "deep" / "up").symlink_to(root)
    with pytest.raises(UserError, match=f"{root}/deep/up is a link back to {root}"):
        names(root)


def test_the_home_of_nobody():
    with pytest.raises(UserError, match="dataset.name=~nobody-here/x: there is no such user"):
        data_folder("~nobody-here/x")


# -- tables ----------------------------------------------------------------------------------------


@pytest.fixture
def rewrite(hub_folder):
    """Writes each table again as other programs would, after ``change`` of its list of images."""
    from pyarrow import array, parquet

    def write(change) -> None:
        for path in hub_folder.rglob("*.parquet"):
            table = parquet.read_table(path).replace_schema_metadata(None)
            images = array(change(table.column("img").to_pylist()))
            parquet.write_table(table.set_column(0, "img", images), path)

    return write


@pytest.mark.parametrize(
    "change", [lambda images: images, lambda images: [image["bytes"] for image in images]]
)
def test_bytes_of_images_are_images(hub_folder, rewrite, change):
    expected = animals().load()
    rewrite(change)
    found = animals(cache=False).load()
    for part in ("train", "test"):
        assert torch.equal(found[part].inputs, expected[part].inputs)
        assert torch.equal(found[part].target, expected[part].target)


def test_text_is_no_image(hub_folder, rewrite):
    rewrite(lambda images: ["http://somewhere/1.png" for _ in images])
    with pytest.raises(UserError, match="the column 'img' does not hold images"):
        animals().load()


@pytest.fixture
def three_tables(hub_folder, hub_cache):
    """The training split in three files of ten rows."""
    (path,) = hub_folder.rglob("train-*.parquet")
    rows = hub_cache.Dataset.from_parquet(str(path))
    path.unlink()
    files = [path.with_name(f"train-{number:05d}-of-00003.parquet") for number in range(3)]
    for number, file in enumerate(files):
        rows.shard(3, number, contiguous=True).to_parquet(file)
    return files


def test_several_tables_are_one_split(hub_folder, three_tables):
    train = animals().load()["train"]
    assert len(train) == 30
    assert train.target.tolist() == [number % 3 for number in range(30)]


def test_a_table_that_is_not_there_is_missed(hub_folder, three_tables):
    three_tables[1].unlink()
    with pytest.raises(UserError) as caught:
        animals().load()
    assert str(caught.value) == f"{three_tables[1].parent} lacks {three_tables[1].name}"


def test_a_corrupt_image_is_traced_to_its_table(hub_folder, three_tables):
    from pyarrow import array, parquet

    table = parquet.read_table(three_tables[1])
    images = table.column("img").to_pylist()
    images[4] = {"bytes": b"torn", "path": None}
    column = array(images, type=table.schema.field("img").type)
    parquet.write_table(table.set_column(0, table.schema.field("img"), column), three_tables[1])
    with pytest.raises(UserError) as caught:
        animals().load()
    assert str(caught.value) == f"cannot decode {three_tables[1]}, row 4: not a known image"


def test_a_page_that_is_no_yaml_is_named(hub_folder):
    page = hub_folder / "README.md"
    page.write_text("---\nconfigs: [\n---\n")
    with pytest.raises(UserError) as caught:
        animals().load()
    message = str(caught.value)
    assert message.startswith(f"cannot read {page}: ") and "\n" not in message


def test_the_library_does_not_speak_beside_us(hub_folder, capfd):
    (path,) = hub_folder.rglob("train-*.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"cannot read {path}: "):
        animals().load()
    assert "Failed to read" not in capfd.readouterr().err


# -- class folders ---------------------------------------------------------------------------------


def test_what_is_hidden_is_no_class_and_no_image(class_folders):
    (class_folders / "train" / ".ipynb_checkpoints").mkdir()
    (class_folders / "train" / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    source = open_folder(class_folders, "train")
    assert source.class_names == ["cat", "dog", "eel"] and len(source.target) == 24


def test_a_misspelt_split_is_answered_with_the_folders_there_are(class_folders):
    module = Images(name=str(class_folders), test_split="tset", image_size=8, **PLAIN)
    with pytest.raises(UserError) as caught:
        module.load()
    assert str(caught.value) == f"{class_folders} has no split 'tset'; it has test, train"


# -- pixels ----------------------------------------------------------------------------------------


def grey(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_of_sixteen_bits_the_upper_eight_are_kept(class_folders, suffix, channels):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 7
    grey(class_folders / "train" / "cat" / f"00{suffix}", values)
    image = decode(open_folder(class_folders, "train"), 1, channels)
    assert np.array_equal(np.asarray(image.convert("L")), np.arange(256).reshape(16, 16))


def test_pixels_without_a_range_are_refused(class_folders):
    file = class_folders / "train" / "cat" / "00.tif"
    grey(file, np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(UserError, match=f"{file}: pixels of type 'F'"):
        decode(open_folder(class_folders, "train"), 1, 3)
