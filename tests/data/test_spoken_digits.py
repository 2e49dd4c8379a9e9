"""Pairs of images and recordings: how they are made, and what is said of bad ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kdrun.data.av_mnist import AVMNIST
from kdrun.data.seeding import stream
from kdrun.data.spectrogram import add_noise, log_mel, mel_filters
from kdrun.data.spoken_digits import SpokenDigits, pair_within_class, reduced
from kdrun.errors import UserError
from tests.spoken import tone, write_av_mnist, write_spoken_digits

pytest.importorskip("soundfile")
pytest.importorskip("datasets")
SMALL = {"train_pairs": 50, "validation_pairs": 20}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def prepared(folder: Path, **options) -> SpokenDigits:
    data = SpokenDigits(name=str(folder), **(SMALL | options))
    data.prepare()
    return data


def first(data: SpokenDigits, part: str = "train"):
    options = {"batch_size": 2000, "device": "cpu"}
    if part == "train":
        return next(iter(data.train(seed=0, shuffle=False, **options)))
    return next(iter(getattr(data, part)(**options)))


# -- pairs -----------------------------------------------------------------------------------------


def test_a_sample_is_an_image_and_a_spectrogram_of_one_digit(tmp_path: Path) -> None:
    data = prepared(write_spoken_digits(tmp_path / "set"))
    assert data.input_shape == {"image": (1, 16, 16), "audio": (1, 32, 32)}
    assert (data.train_size, data.validation_size, data.test_size) == (50, 20, 40)
    batches = {part: first(data, part) for part in ("train", "validation", "test")}
    indices = torch.cat([batch.index for batch in batches.values()])
    assert indices.sort().values.tolist() == list(range(110)), "every recording occurs once"
    images = [set(map(bytes, b.inputs["image"].numpy())) for b in batches.values()]
    assert not (images[0] & images[1] or images[0] & images[2] or images[1] & images[2])
    train = batches["train"]
    assert train.inputs["audio"].mean().abs() < 1e-5
    assert train.inputs["audio"].std().item() == pytest.approx(1, abs=1e-4)
    assert train.target.bincount().tolist() == [5] * 10
    # The tone of a digit lies in its band: the loudest band rises with the digit.
    quiet = prepared(tmp_path / "set", snr_db=None)
    batch = first(quiet)
    loudest = batch.inputs["audio"][:, 0, :, 3].argmax(1).float()
    means = [loudest[batch.target == digit].mean().item() for digit in range(10)]
    assert means == sorted(means)


def test_pairing_is_fixed_by_its_seed(tmp_path: Path) -> None:
    folder = write_spoken_digits(tmp_path / "set")
    again, other = prepared(folder), prepared(folder, pair_seed=1)
    data = prepared(folder)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first(data).inputs["image"], first(again).inputs["image"])
    assert not torch.equal(first(data).inputs["image"], first(other).inputs["image"])
    assert torch.equal(first(data).index, first(other).index), "the parts stay"


def test_partners_are_of_the_class_and_used_about_equally_often() -> None:
    target, other = torch.arange(20) % 2, torch.arange(6) % 2
    partners = pair_within_class(target, other, stream(0))
    assert torch.equal(other[partners], target)
    assert set(partners.bincount().tolist()) == {3, 4}
    with pytest.raises(UserError, match="no sample of class 2"):
        pair_within_class(torch.tensor([2]), other, stream(0))


def test_images_keep_the_share_of_their_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 6, generator=generator) * torch.tensor([3.0, 2, 1, 1, 1, 1])
    rows = torch.arange(150)
    assert torch.equal(reduced(images, rows, 1.0), images)
    total = (images[rows] - images[rows].mean(0)).square().sum()
    kept = []
    for energy in (0.25, 0.6, 0.9):
        few = reduced(images, rows, energy)
        kept.append((few[rows] - few[rows].mean(0)).square().sum() / total)
        assert kept[-1] >= energy
        rank = torch.linalg.matrix_rank(few - few[rows].mean(0), atol=1e-3)
        assert rank == {0.25: 1, 0.6: 2, 0.9: 5}[energy]
    assert kept == sorted(kept)


# -- spectrograms ----------------------------------------------------------------------------------


def test_a_tone_is_loudest_in_its_band_and_noise_has_the_asked_power() -> None:
    times = torch.arange(8000) / 8000
    waves = torch.sin(2 * torch.pi * torch.tensor([[500.0], [3000.0]]) * times)
    options = {"sample_rate": 8000, "bands": 32, "frames": 20, "window": 256, "hop": 160}
    picture = log_mel(waves, **options)
    assert picture.shape == (2, 32, 20)
    filters = mel_filters(32, 256, 8000)
    assert (filters.sum(1) > 0).all() and filters.max() <= 1
    for row, frequency in enumerate((500, 3000)):
        band = filters[:, round(frequency / (4000 / 128))].argmax()
        assert picture[row].mean(1).argmax() == band
    noisy = add_noise(waves, torch.tensor([8000, 8000]), 10.0, stream(0))
    ratio = waves.square().sum(1) / (noisy - waves).square().sum(1)
    assert torch.allclose(10 * ratio.log10(), torch.full((2,), 10.0), atol=0.3)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sound", "said"),
    [
        (b"this is no sound", "train, row 7 cannot be read as sound: "),
        (tone(0, 0, seconds=0.0), "train, row 7 is an empty clip"),
        (tone(0, 0, rate=16000), "train, row 7: 16000 samples a second, dataset.sample_rate is"),
        (None, "train, row 7 holds no sound"),
    ],
)
def test_a_bad_clip_is_named_in_one_line(tmp_path: Path, sound, said: str) -> None:
    folder = write_spoken_digits(tmp_path / "set", replace={7: sound})
    with pytest.raises(UserError) as refused:
        prepared(folder)
    message = str(refused.value)
    assert said in message and message.startswith(str(folder)) and "\n" not in message


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    folder = write_spoken_digits(tmp_path / "set", column="sound")
    with pytest.raises(
        UserError, match=r"no column 'audio' \(dataset.audio_column\); it has sound"
    ):
        prepared(folder)
    assert prepared(folder, audio_column="sound").train_size == 50


def test_more_pairs_than_recordings_are_refused(tmp_path: Path) -> None:
    folder = write_spoken_digits(tmp_path / "set")
    with pytest.raises(UserError, match="ask for 120 recordings; the training split of .* has 80"):
        prepared(folder, train_pairs=100)


# -- AV-MNIST --------------------------------------------------------------------------------------


def test_av_mnist_is_pooled_and_split_anew(tmp_path: Path) -> None:
    folder = write_av_mnist(tmp_path / "avmnist")
    data = AVMNIST(name=str(folder))
    data.prepare()
    assert data.input_shape == {"image": (1, 28, 28), "audio": (1, 112, 112)}
    assert (data.train_size, data.validation_size, data.test_size) == (48, 16, 16)
    batch = next(iter(data.train(batch_size=48, seed=0, device="cpu", shuffle=False)))
    assert batch.inputs["image"].dtype is torch.float32 and batch.inputs["image"].max() <= 1
    stored = np.concatenate(
        [np.load(folder / "image" / f"{split}_data.npy") for split in ("train", "test")]
    )[batch.index]
    assert torch.allclose(
        batch.inputs["image"].flatten(1), torch.from_numpy(stored) / 255, atol=1e-3
    )
    other = AVMNIST(name=str(folder), split_seed=1)
    other.prepare()
    assert other.fingerprint != data.fingerprint


def test_av_mnist_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not on the hub"):
        AVMNIST(name="no_such_set").prepare()
    folder = write_av_mnist(tmp_path / "avmnist")
    np.save(folder / "test_labels.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(UserError, match="does not hold pairs: 63 labels, 80 images"):
        AVMNIST(name=str(folder)).prepare()
    (folder / "audio" / "test_data.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="test_data.npy cannot be read"):
        AVMNIST(name=str(folder)).prepare()
    (folder / "audio" / "test_data.npy").unlink()
    with pytest.raises(UserError, match="test_data.npy is missing"):
        AVMNIST(name=str(folder)).prepare()


# -- the real recordings ---------------------------------------------------------------------------


@pytest.mark.skipif("KDRUN_DATA" not in os.environ, reason="KDRUN_DATA names no data folder")
def test_the_real_recordings() -> None:
    name = "mteb/free-spoken-digit-dataset"
    if not Path(os.environ["KDRUN_DATA"], name).is_dir():
        pytest.skip(f"KDRUN_DATA has no {name}")
    data = SpokenDigits()
    data.prepare()
    assert (data.train_size, data.validation_size, data.test_size) == (1500, 300, 1200)
    counts = first(data, "test").target.bincount()
    assert counts.min() >= 110 and counts.sum() == 1200, "stratified, and all takes are there"
