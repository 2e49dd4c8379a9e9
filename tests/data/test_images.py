from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch

from kdrun.data.augment import Augmentation
from kdrun.data.images import Images
from kdrun.data.pixel_cache import cache_root
from kdrun.errors import UserError

PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}  # inputs are then the stored values


def pixels(number: int) -> np.ndarray:
    """The image that the fixtures store under this number."""
    return np.random.default_rng(number).integers(0, 256, (10, 10, 3), dtype=np.uint8)


def animals(**options) -> Images:
    defaults = {"name": "owner/animals", "image_column": "img", "label_column": "kind"}
    return Images(**PLAIN | defaults | options)


def prepared(protocol="holdout", **options) -> Images:
    module = animals(**options)
    module.prepare(protocol)
    return module


def everything(loader):
    batches = list(loader)
    return (
        torch.cat([batch.inputs for batch in batches]),
        torch.cat([batch.target for batch in batches]),
        torch.cat([batch.index for batch in batches]),
    )


@pytest.mark.parametrize("cache", [True, False])
def test_hub_layout(hub_folder, cache):
    module = prepared(cache=cache, val_fraction=0.2)
    assert module.class_names == ["cat", "dog", "eel"] and module.input_shape == (3, 10, 10)
    assert (module.train_size, module.validation_size, module.test_size) == (24, 6, 12)
    inputs, target, index = everything(module.train(batch_size=7, seed=0, device="cpu"))
    for image, kind, number in zip(inputs, target.tolist(), index.tolist(), strict=True):
        expected = torch.from_numpy(pixels(number).transpose(2, 0, 1)).float()
        assert torch.allclose(image, expected, atol=1e-3)
        assert kind == number % 3
    _, target, index = everything(module.validation(batch_size=7, device="cpu"))
    assert target.bincount().tolist() == [2, 2, 2]


def test_second_start_reads_the_cache_alone(hub_folder, monkeypatch):
    first = prepared()
    assert len(list(cache_root().iterdir())) == 2  # train and test, no scratch folder left
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would fail
    second = prepared()
    assert first.fingerprint == second.fingerprint
    first, second = (next(iter(m.test(batch_size=12, device="cpu"))) for m in (first, second))
    assert torch.equal(first.inputs, second.inputs)


def test_changed_data_are_decoded_again(hub_folder):
    before = prepared().fingerprint
    (test,) = hub_folder.rglob("test-*.parquet")
    (train,) = hub_folder.rglob("train-*.parquet")
    test.write_bytes(train.read_bytes())
    after = prepared()
    assert after.test_size == 30 and after.fingerprint != before


def test_the_cached_file_cannot_be_changed_through_the_tensor(hub_folder):
    module = animals()
    part = module.load()["test"]
    before = part.inputs.clone()
    part.inputs.zero_()
    assert torch.equal(animals().load()["test"].inputs, before)


def test_same_batches_resident_or_streamed(hub_folder):
    options = {"augmentation": Augmentation(crop_padding=2, flip=0.5), "image_size": 10}
    resident = prepared(**options)
    streamed = prepared(storage="stream", workers=0, **options)
    for first, second in zip(
        resident.train(batch_size=8, seed=3, device="cpu"),
        streamed.train(batch_size=8, seed=3, device="cpu"),
        strict=True,
    ):
        assert torch.equal(first.inputs, second.inputs)
        assert torch.equal(first.index, second.index)


def test_sizes_and_channels(hub_folder):
    module = prepared(image_size=6, channels=1, mean=[0.5], std=[0.5])
    assert module.input_shape == (1, 6, 6)
    assert next(iter(module.test(batch_size=2, device="cpu"))).inputs.shape == (2, 1, 6, 6)


def test_an_image_of_the_right_size_is_resized_before_its_centre_is_cut(hub_folder):
    options = {"image_size": 10, "resize": 14, "augmentation": None}
    batches = [
        next(iter(prepared(storage=storage, **options).test(batch_size=12, device="cpu")))
        for storage in ("resident", "stream")
    ]
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    as_stored = next(iter(prepared().test(batch_size=12, device="cpu")))
    assert not torch.allclose(batches[0].inputs, as_stored.inputs, atol=1)


@pytest.mark.parametrize("classes", [["eel", "cat"], [2, 0]])
def test_chosen_classes_are_renumbered(hub_folder, classes):
    module = prepared(classes=classes)
    assert module.class_names == ["eel", "cat"] and module.num_classes == 2
    _, target, index = everything(module.train(batch_size=8, seed=0, device="cpu"))
    assert torch.equal(target, (index % 3 == 0).long())
    assert module.test_size == 8


def test_first_classes(hub_folder):
    assert prepared(classes=2).class_names == ["cat", "dog"]


def test_a_trial_judges_some_images_of_each_class(hub_folder):
    trial, whole = prepared(test_per_class=1), prepared()
    assert (trial.validation_size, trial.test_size) == (3, 3)
    assert trial.train_size == whole.train_size
    _, target, index = everything(trial.test(batch_size=2, device="cpu"))
    assert sorted(target.tolist()) == [0, 1, 2]
    assert set(index.tolist()) < set(everything(whole.test(batch_size=2, device="cpu"))[2].tolist())
    assert trial.fingerprint != whole.fingerprint


def test_few_shot_and_long_tail(hub_folder):
    few = prepared(per_class=4)
    _, target, _ = everything(few.train(batch_size=8, seed=0, device="cpu"))
    assert target.bincount().tolist() == [4, 4, 4]
    assert few.test_size == 12 and few.validation_size == 3
    tail = prepared("paper", long_tail=10.0)
    _, target, _ = everything(tail.train(batch_size=8, seed=0, device="cpu"))
    assert target.bincount().tolist() == [10, 3, 1]


def test_own_validation_split(hub_folder):
    module = prepared(validation_split="test")
    assert (module.train_size, module.validation_size) == (30, 12)


def test_labels_without_names(hub_folder, hub_cache):
    for file, kinds in (("train", ["b", "a", "c"]), ("test", ["c", "b", "c"])):
        (path,) = hub_folder.rglob(f"{file}-*.parquet")
        rows = hub_cache.Dataset.from_parquet(str(path)).select(range(3))
        rows = rows.remove_columns("kind").add_column("kind", kinds)
        rows.to_parquet(path)
    module = prepared("paper")
    assert module.class_names == ["a", "b", "c"]
    _, target, index = everything(module.test(batch_size=3, device="cpu"))
    assert target.tolist() == [2, 1, 2] and index.tolist() == [0, 1, 2]


def test_class_folders(class_folders):
    module = Images(name=str(class_folders), image_size=8, resize=10, **PLAIN)
    module.prepare("holdout")
    assert module.class_names == ["cat", "dog", "eel"]
    assert (module.train_size, module.validation_size, module.test_size) == (22, 2, 12)


# -- what goes wrong, in one line ------------------------------------------------------------------


def refusal(module: Images) -> str:
    with pytest.raises(UserError) as caught:
        module.prepare("holdout")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_such_data(hub_folder, monkeypatch):
    message = refusal(animals(name="owner/plants"))
    assert "owner/plants: not below KDRUN_DATA=" in message and "hub says" in message
    assert "there is no such folder" in refusal(animals(name="/nowhere/at/all"))
    assert f"{__file__} is a file, not a folder" in refusal(animals(name=__file__))
    monkeypatch.setenv("KDRUN_DATA", "/nowhere")
    assert refusal(animals()) == "KDRUN_DATA=/nowhere is not a folder"


def test_no_such_split_or_column(hub_folder):
    message = refusal(animals(test_split="valid"))
    assert message.endswith("owner/animals has no split 'valid'; it has train, test")
    message = refusal(animals(image_column="image"))
    assert "no column 'image' (dataset.image_column); it has img, kind" in message
    assert "no column 'label' (dataset.label_column)" in refusal(animals(label_column="label"))
    assert "does not hold images" in refusal(animals(image_column="kind"))


def test_a_corrupt_parquet_file_is_named(hub_folder):
    (path,) = hub_folder.rglob("train-*.parquet")
    path.write_bytes(path.read_bytes()[:500] + b"garbage" * 20)
    assert f"cannot read {path}: " in refusal(animals())


@pytest.mark.parametrize("storage", ["resident", "stream"])
def test_a_corrupt_image_is_named(class_folders, storage):
    broken = class_folders / "test" / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    module = Images(name=str(class_folders), image_size=8, storage=storage, workers=1, **PLAIN)
    if storage == "resident":
        assert f"cannot decode {broken}" in refusal(module)
        assert list(cache_root().glob("*.*")) == []  # no half-filled cache
        return
    module.prepare("holdout")
    with pytest.raises(UserError, match=f"cannot decode {broken}") as caught:
        list(module.test(batch_size=4, device="cpu"))
    assert "\n" not in str(caught.value)


def test_a_corrupt_image_in_a_row_is_named(hub_folder, hub_cache):
    (path,) = hub_folder.rglob("train-*.parquet")
    rows = hub_cache.Dataset.from_parquet(str(path)).cast_column(
        "img", hub_cache.Image(decode=False)
    )
    rows = rows.map(
        lambda row, n: {"img": {"bytes": b"x", "path": None}} if n == 7 else row, with_indices=True
    )
    rows.to_parquet(path)
    assert f"cannot decode {path}, row 7: not a known image" == refusal(animals())


def test_images_of_different_sizes(class_folders):
    message = refusal(Images(name=str(class_folders), **PLAIN))
    assert "the first image is 30x20: set dataset.image_size" in message


def test_no_class_folders(class_folders):
    message = refusal(Images(name=str(class_folders), train_split="cat", image_size=8, **PLAIN))
    assert str(class_folders) in message


def test_an_empty_class(class_folders):
    (class_folders / "train" / "fox").mkdir()
    assert "fox holds no image" in refusal(Images(name=str(class_folders), image_size=8, **PLAIN))


def test_a_class_that_train_has_not(class_folders):
    (class_folders / "test" / "cat").rename(class_folders / "test" / "fox")
    message = refusal(Images(name=str(class_folders), image_size=8, **PLAIN))
    assert "has a class 'fox' that train has not" in message


def test_one_class(class_folders):
    for split in ("train", "test"):
        for name in ("dog", "eel"):
            shutil.rmtree(class_folders / split / name)
    message = refusal(Images(name=str(class_folders), image_size=8, **PLAIN))
    assert message == "there is one class only, 'cat': nothing to tell apart"


def test_too_few_images_for_few_shot(hub_folder):
    message = refusal(animals(per_class=500))
    assert message.startswith("dataset.per_class=500: class 0 has 9 samples")
    message = refusal(animals(test_per_class=5))
    assert message.startswith("dataset.test_per_class=5: class 0 has")


def test_too_large_for_memory(hub_folder, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 1000))
    assert "set dataset.storage=stream" in refusal(animals(image_size=2000))


@pytest.mark.parametrize(
    ("classes", "message"),
    [(["fox"], "no class 'fox' among 3"), ([3], "no class 3"), ([1, 1], "1 comes twice"), (4, "3")],
)
def test_classes_that_do_not_exist(hub_folder, classes, message):
    assert message in refusal(animals(classes=classes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, "mean and std need 3 numbers"),
        ({"mean": [125.3, 123.0, 113.9]}, r"mean must be within \[0, 1\]"),
        ({"std": [0.2, 0.0, 0.2]}, "std positive"),
        ({"storage": "stream"}, "image_size is needed"),
        ({"crop_scale": [0.1, 1.0]}, "needs storage=stream"),
        ({"storage": "stream", "image_size": 8, "crop_scale": [0.9, 0.1]}, "two rising shares"),
        ({"per_class": 2, "long_tail": 10.0}, "exclude each other"),
        ({"image_size": 8, "resize": 6}, "must be at least image_size"),
        ({"storage": "disk"}, "storage must be one of resident, stream"),
        ({"long_tail": 0.5}, "long_tail must be"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        animals(**options)
