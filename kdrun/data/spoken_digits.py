"""Digits seen and heard: an image and a recording of the same digit make one sample."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kdrun.data.batches import Preprocessing
from kdrun.data.bundled import bundled_table
from kdrun.data.digits import TEST_SIZE
from kdrun.data.module import SPLIT_SEED, DataModule
from kdrun.data.recordings import Recordings, open_recordings
from kdrun.data.resident import Samples
from kdrun.data.seeding import stream
from kdrun.data.spectrogram import add_noise, log_mel
from kdrun.data.splits import stratified
from kdrun.errors import UserError
from kdrun.parameters import Fraction, NonNegativeInt, PositiveInt

VALIDATION_IMAGES = 250
PAIRING, NOISE = 1, 2
"""Words that name the streams of the two random choices."""


class SpokenDigits(DataModule):
    """scikit-learn's digits paired with the Free Spoken Digit recordings (3,000, six speakers).

    Samples have two inputs: ``image`` ``(1, image_size, image_size)`` and ``audio``
    ``(1, bands, frames)``, the log-mel spectrogram. ``train_pairs`` and ``validation_pairs``
    recordings are drawn, stratified, from the set's training split; all others, its test split
    among them, are the test set. Images are split apart too (1,047 / 250 / 500): neither an image
    nor a recording occurs in two parts. Each recording is paired once, with an image of its digit
    from the same part; the images of a digit are shuffled and taken in turn. So a pair shares the
    digit and nothing else. As in AV-MNIST both inputs are made harder: of the images only some
    principal components are kept, and the recordings have noise. All this is fixed by ``pair_seed``
    and the same for every seed of a run.

    Args:
        name: of the hub data set, or of a folder of the same layout.
        audio_column: the encoded clips.
        label_column: the digits.
        sample_rate: of the clips.
        train_pairs: recordings, and so pairs, to learn from.
        validation_pairs: to validate with.
        image_size: side to which the 8x8 images are enlarged (bilinear).
        image_energy: share of the images' variance that is kept: as many of the leading principal
            components of the training images as it takes to reach it; 1 keeps the images.
        snr_db: power of a clip against that of the white noise added to it, in decibels; null: no
            noise.
        bands: mel bands.
        frames: of the spectrogram.
        window: samples of a frame.
        hop: samples between frames; clips are cut or filled to ``frames * hop`` samples.
        pair_seed: of pairing and noise.
    """

    def __init__(
        self,
        *,
        name: str = "mteb/free-spoken-digit-dataset",
        audio_column: str = "audio",
        label_column: str = "label",
        sample_rate: PositiveInt = 8000,
        train_pairs: PositiveInt = 1500,
        validation_pairs: PositiveInt = 300,
        image_size: PositiveInt = 16,
        image_energy: Fraction = 0.25,
        snr_db: float | None = 5.0,
        bands: PositiveInt = 32,
        frames: PositiveInt = 32,
        window: PositiveInt = 256,
        hop: PositiveInt = 160,
        pair_seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(val_fraction=0.0, preprocessing=Preprocessing())
        self.name = name
        self.columns = {"audio_column": audio_column, "label_column": label_column}
        self.train_pairs, self.validation_pairs = train_pairs, validation_pairs
        self.image_size, self.image_energy = image_size, image_energy
        self.snr_db = snr_db
        self.spectrogram = {
            "sample_rate": sample_rate,
            "bands": bands,
            "frames": frames,
            "window": window,
            "hop": hop,
        }
        self.pair_seed = pair_seed

    def load(self) -> dict[str, Samples]:
        """Training, validation and test pairs."""
        self.class_names = [str(digit) for digit in range(10)]
        read = [self._read("train"), self._read("test")]
        heard = torch.cat([_digits(recordings, self.name) for recordings in read])
        parts = self._split(heard, available=len(read[0].target))
        audio = self._spectrograms(read)
        scale = audio[parts["train"]]
        audio = (audio - scale.mean()) / scale.std()
        images, seen = _bundled_images()
        pictures = _parts_of_images(seen)
        images = reduced(images, pictures["train"], self.image_energy)
        images = torch.nn.functional.interpolate(
            images.view(-1, 1, 8, 8), (self.image_size, self.image_size), mode="bilinear"
        )
        # Named by what it is made from: the last bits of a spectrogram differ between machines.
        made_from = [recordings.content for recordings in read]
        made_from += [str(value) for value in (self.spectrogram, self.snr_db, self.image_size)]
        made_from += [str(value) for value in (self.image_energy, self.pair_seed)]
        content = hashlib.sha256(" ".join(made_from).encode()).hexdigest()
        samples = {}
        for number, (part, rows) in enumerate(parts.items()):
            words = stream(self.pair_seed, PAIRING, number)
            partners = pictures[part][pair_within_class(heard[rows], seen[pictures[part]], words)]
            inputs = {"image": images[partners], "audio": audio[rows]}
            samples[part] = Samples(inputs, heard[rows], rows, content)
        return samples

    def _read(self, split: str) -> Recordings:
        return open_recordings(
            self.name,
            split,
            **self.columns,
            sample_rate=self.spectrogram["sample_rate"],
            samples=self.spectrogram["frames"] * self.spectrogram["hop"],
        )

    def _spectrograms(self, read: list[Recordings]) -> Tensor:
        """Log-mel ``(N, 1, bands, frames)`` of all recordings, with noise."""
        waves = torch.cat([recordings.waves for recordings in read])
        if self.snr_db is not None:
            lengths = torch.cat([recordings.lengths for recordings in read])
            waves = add_noise(waves, lengths, self.snr_db, stream(self.pair_seed, NOISE))
        return log_mel(waves, **self.spectrogram).unsqueeze(1)

    def _split(self, heard: Tensor, available: int) -> dict[str, Tensor]:
        """Which recordings are for what, of which the first ``available`` may be learned from."""
        count = self.train_pairs + self.validation_pairs
        if count > available:
            raise UserError(
                f"dataset.train_pairs and dataset.validation_pairs ask for {count} recordings; "
                f"the training split of {self.name} has {available}"
            )
        drawn, _ = stratified(heard[:available], count, seed=SPLIT_SEED)
        chosen, others = stratified(heard[drawn], self.validation_pairs, seed=SPLIT_SEED)
        left = torch.ones(len(heard), dtype=torch.bool)
        left[drawn] = False
        test = left.nonzero().flatten()
        return {"train": drawn[others], "validation": drawn[chosen], "test": test}


def _bundled_images() -> tuple[Tensor, Tensor]:
    """The images ``(1797, 64)`` in [0, 1] and their digits."""
    table, _ = bundled_table("digits.csv.gz")
    return torch.from_numpy(table[:, :64]).float() / 16, torch.from_numpy(table[:, 64]).long()


def _parts_of_images(seen: Tensor) -> dict[str, Tensor]:
    test, rest = stratified(seen, TEST_SIZE, seed=SPLIT_SEED)
    chosen, others = stratified(seen[rest], VALIDATION_IMAGES, seed=SPLIT_SEED)
    return {"train": rest[others], "validation": rest[chosen], "test": test}


def pair_within_class(target: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """For each of ``(N,)`` class ids the number of a sample of that class in ``other`` ``(M,)``.

    The samples of a class are shuffled and taken in turn, so each is used about equally often.

    Raises:
        UserError: ``other`` lacks a class.
    """
    partners = torch.empty_like(target)
    for digit in target.unique().tolist():
        rows, candidates = (ids.eq(digit).nonzero().flatten() for ids in (target, other))
        if not len(candidates):
            raise UserError(f"there is no sample of class {digit} to pair with")
        order = candidates[torch.randperm(len(candidates), generator=generator)]
        partners[rows] = order[torch.arange(len(rows)) % len(order)]
    return partners


def _digits(recordings: Recordings, name: str) -> Tensor:
    """The digit of each recording."""
    class_names = recordings.class_names
    if sorted(class_names) != [str(digit) for digit in range(10)]:
        found = ", ".join(class_names)
        raise UserError(f"{name}: the classes must be the digits 0 to 9, they are {found}")
    return torch.tensor([int(class_name) for class_name in class_names])[recordings.target]


def reduced(images: Tensor, fitted: Tensor, energy: float) -> Tensor:
    """Images ``(N, D)`` on the leading principal components of ``images[fitted]``.

    As many components as hold the share ``energy`` of the variance, at least one.
    """
    if energy == 1:
        return images
    mean = images[fitted].mean(0)
    _, sizes, directions = torch.linalg.svd(images[fitted] - mean, full_matrices=False)
    kept = sizes.square().cumsum(0) / sizes.square().sum()
    basis = directions[: int((kept < energy).sum()) + 1]
    return mean + (images - mean) @ basis.T @ basis
