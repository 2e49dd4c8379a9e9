"""Image classification sets from the hub or from disk, in memory or streamed, by one code path."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from kdrun.data.augment import Augmentation, Mix
from kdrun.data.batches import Preprocessing
from kdrun.data.class_folders import is_folder_layout, open_folder, split_folder
from kdrun.data.module import SPLIT_SEED, DataModule, Part
from kdrun.data.normalise import Normalisation
from kdrun.data.pixel_cache import decoded
from kdrun.data.sources import ImageSource, data_files, data_folder, open_hub, stat_of
from kdrun.data.splits import keep_classes, long_tail, per_class
from kdrun.data.streaming import Geometry, StreamedSamples, default_workers
from kdrun.errors import UserError
from kdrun.parameters import Interval, NonNegativeInt, PositiveInt, ProperFraction


class Images(DataModule):
    """A set of images with one class each.

    ``name`` is looked up below ``KDRUN_DATA`` first, then as a path, then on the hub. A folder
    holds either the files of a hub data set (``train-*.parquet`` and so on) or one folder per
    class below each split. Images are taken as they are stored: a camera's note that a picture is
    to be turned (EXIF) is not followed, as in torchvision.

    Args:
        name: data set on the hub, or folder.
        configuration: of hub data sets that have several; null for the only one.
        revision: commit or tag on the hub; null for the newest, or what is already on this machine.
        image_column: column of the images; not used for class folders.
        label_column: column of the classes; not used for class folders.
        train_split: name of the training split.
        test_split: name of the test split.
        validation_split: name of the validation split; null holds ``val_fraction`` out of train.
        val_fraction: share of train held out for validation.
        storage: ``resident`` keeps decoded images on the training device, ``stream`` decodes them
            again in each epoch.
        image_size: side of the inputs in pixels; null keeps the images (all of one size) as stored.
        resize: shorter side before the central crop to ``image_size``; null: ``image_size``.
        crop_scale: streamed training images are cropped to a random share of their area in this
            range, aspect ratio 3/4 to 4/3, and resized; null trains on the central crop.
        channels: 3 for colour, 1 for grey; images are converted.
        classes: only the first n, or the listed ids or names, renumbered in this order.
        per_class: training images kept of each class (few-shot); null keeps all.
        long_tail: largest over smallest class size of an exponentially falling training set; null
            keeps the sizes.
        test_per_class: images of each class to validate and test on, for trials: figures on a part
            of the test set compare with no others; null for all.
        mean: of each channel, in [0, 1].
        std: of each channel, likewise.
        augmentation: of training images; null for none.
        views: further augmented views by name, for methods that compare views.
        mix: mixup or CutMix of training batches; null for none.
        cache: keep decoded resident images on disk, so that the next start is instant.
        workers: processes that decode streamed images; null: one per core.
    """

    def __init__(
        self,
        *,
        name: str,
        configuration: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str = "train",
        test_split: str = "test",
        validation_split: str | None = None,
        val_fraction: ProperFraction = 0.1,
        storage: Literal["resident", "stream"] = "resident",
        image_size: PositiveInt | None = None,
        resize: PositiveInt | None = None,
        crop_scale: list[float] | None = None,
        channels: Literal[1, 3] = 3,
        classes: PositiveInt | list[int] | list[str] | None = None,
        per_class: PositiveInt | None = None,
        long_tail: Annotated[float, Interval(low=1)] | None = None,
        test_per_class: PositiveInt | None = None,
        mean: list[float],
        std: list[float],
        augmentation: Augmentation | None = None,
        views: dict | None = None,
        mix: Mix | None = None,
        cache: bool = True,
        workers: NonNegativeInt | None = None,
    ) -> None:
        normalisation = Normalisation(mean, std)
        super().__init__(
            val_fraction=val_fraction,
            preprocessing=Preprocessing(normalisation, augmentation, views or {}, mix),
        )
        if not len(mean) == len(std) == channels:
            raise ValueError(f"mean and std need {channels} numbers each, one per channel")
        if not all(0 <= share <= 1 for share in mean) or not all(width > 0 for width in std):
            raise ValueError("mean must be within [0, 1] and std positive, for values in [0, 1]")
        if storage == "stream" and image_size is None:
            raise ValueError("image_size is needed with storage=stream")
        if storage == "resident" and crop_scale is not None:
            raise ValueError(
                "crop_scale needs storage=stream; resident images have augmentation.crop_padding"
            )
        if crop_scale is not None and not (
            len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1] <= 1
        ):
            raise ValueError(f"crop_scale must be two rising shares in (0, 1], got {crop_scale}")
        if per_class is not None and long_tail is not None:
            raise ValueError("per_class and long_tail exclude each other")
        if resize is not None and (image_size is None or resize < image_size):
            raise ValueError(f"resize={resize} must be at least image_size={image_size}")
        self.name, self.configuration, self.revision = name, configuration, revision
        self.image_column, self.label_column = image_column, label_column
        self.splits = {"train": train_split, "test": test_split}
        if validation_split is not None:
            self.splits["validation"] = validation_split
        self.storage, self.image_size, self.resize = storage, image_size, resize
        self.crop_scale, self.channels = crop_scale, channels
        self.classes, self.per_class, self.long_tail = classes, per_class, long_tail
        self.test_per_class = test_per_class
        self.cache, self.workers = cache, workers

    def load(self) -> dict[str, Part]:
        """The splits with the chosen classes."""
        folder = data_folder(self.name)
        splits = self.splits.values()
        in_folders = folder is not None and any(is_folder_layout(folder, one) for one in splits)
        parts, names = {}, []
        for part, split in self.splits.items():  # train comes first and names the classes
            samples, found = self._open(folder, split, in_folders)
            names = names or found
            samples.target = _same_classes(samples.target, found, names, f"{self.name}, {split}")
            parts[part] = samples
        self.class_names = names
        if self.classes is None:
            return parts
        chosen = _class_ids(self.classes, names)
        self.class_names = [names[number] for number in chosen]
        for part, samples in parts.items():
            rows, target = keep_classes(samples.target, chosen, len(names))
            parts[part] = samples.take(rows)
            parts[part].target = target
        return parts

    def select(self, train: Part) -> Tensor:
        """Few-shot or long-tailed rows of the training split."""
        try:
            if self.per_class is not None:
                return per_class(train.target, self.per_class, seed=SPLIT_SEED)
            if self.long_tail is not None:
                return long_tail(train.target, self.long_tail, seed=SPLIT_SEED)
        except ValueError as error:
            raise UserError(f"dataset.per_class={self.per_class}: {error}") from error
        return torch.arange(len(train))

    def judged(self, part: Part) -> Part:
        """Some images of each class where trials are to be short."""
        if self.test_per_class is None:
            return part
        try:
            return part.take(per_class(part.target, self.test_per_class, seed=SPLIT_SEED))
        except ValueError as error:
            raise UserError(f"dataset.test_per_class={self.test_per_class}: {error}") from error

    def _open(self, folder: Path | None, split: str, in_folders: bool) -> tuple[Part, list[str]]:
        def source() -> ImageSource:
            if folder is not None and in_folders:
                return open_folder(folder, split)
            return open_hub(
                self.name,
                split,
                folder=folder,
                image_column=self.image_column,
                label_column=self.label_column,
                configuration=self.configuration,
                revision=self.revision,
            )

        if self.storage == "stream":
            return self._streamed(source())
        return decoded(
            self._key(folder, split, in_folders) if self.cache else "",
            source,
            channels=self.channels,
            size=self.image_size,
            resize=self.resize,
            cache=self.cache,
        )

    def _streamed(self, source: ImageSource) -> tuple[Part, list[str]]:
        scale = None if self.crop_scale is None else tuple(self.crop_scale)
        size = self.image_size
        geometry = Geometry(size, self.resize or size, scale, self.channels)
        workers = default_workers() if self.workers is None else self.workers
        index = torch.arange(len(source.target))
        content = f"{source.content} {geometry}"
        samples = StreamedSamples(source, source.target, index, content, geometry, workers)
        return samples, source.class_names

    def _key(self, folder: Path | None, split: str, in_folders: bool) -> str:
        """Names everything that decides which encoded images a split holds."""
        words = [split, self.image_column, self.label_column]
        if folder is None:
            return repr([*words, self.name, self.configuration, self.revision])
        files = []
        for file in data_files(split_folder(folder, split) if in_folders else folder):
            about = stat_of(file)
            files.append((file.path, about.st_size, about.st_mtime_ns))
        return hashlib.sha256(repr([*words, self.configuration, files]).encode()).hexdigest()


def _class_ids(classes: int | list[int] | list[str], names: list[str]) -> list[int]:
    """Class ids of a choice of classes.

    Raises:
        UserError: for a class that does not exist or comes twice.
    """
    chosen = list(range(classes)) if isinstance(classes, int) else list(classes)
    ids = []
    for choice in chosen:
        number = names.index(choice) if choice in names else choice
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise UserError(f"dataset.classes: no class {choice!r} among {len(names)}")
        if number in ids:
            raise UserError(f"dataset.classes: {choice!r} comes twice")
        ids.append(number)
    return ids


def _same_classes(target: Tensor, found: list[str], names: list[str], label: str) -> Tensor:
    """``target`` in the numbering of ``names`` (the training split's)."""
    if found == names:
        return target
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UserError(f"{label} has a class {unknown[0]!r} that train has not")
    return torch.tensor([names.index(name) for name in found])[target]
