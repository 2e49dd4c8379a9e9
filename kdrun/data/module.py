"""What a data set offers to a run: its splits, as loaders, and a fingerprint of its content."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kdrun.data.augment import Augmentation, Mix
from kdrun.data.loader import Loader, LoaderOptions
from kdrun.data.normalise import Normalisation
from kdrun.data.resident import ResidentLoader, Samples
from kdrun.data.splits import stratified
from kdrun.errors import UserError
from kdrun.parameters import checked_constructor

Protocol = Literal["holdout", "paper"]
"""``holdout``: validation is carved out of train and the test set is touched once, at the end.
``paper``: train is all of train and validation is the test set, as most published numbers were
made."""

SPLIT_SEED = 0
"""Splits are part of a data set, not of an experiment: the same for every seed of a run."""


class DataModule(ABC):
    """A data set with its preprocessing. Call ``prepare`` first.

    Attributes:
        task: what the targets are for.
        num_classes: number of classes.
        input_shape: one input, ``(C, H, W)`` or ``(D,)``.
        class_names: the names, by class id.
        train_size: samples in the training split; likewise ``validation_size``, ``test_size``.
    """

    task: str = "classification"
    num_classes: int
    input_shape: tuple[int, ...]
    class_names: list[str]
    train_size: int
    validation_size: int
    test_size: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__init__ = checked_constructor(cls.__init__)

    @abstractmethod
    def prepare(self, protocol: Protocol = "holdout") -> None:
        """Load the data and make the splits; the attributes above are known afterwards."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that determines a batch but its seed and size.

        Content, splits, normalisation and augmentation; equal on every machine that has equal data.
        """

    @abstractmethod
    def loader(self, part: str, options: LoaderOptions) -> Loader:
        """One split, ``train``, ``validation`` or ``test``, served as ``options`` say."""

    @property
    def view_names(self) -> tuple[str, ...]:
        """The further augmented views that can be asked of the training split."""
        return ()

    def train(
        self,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        views: Sequence[str] = (),
        augment: bool = True,
        shuffle: bool = True,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Loader:
        """The training split; the arguments are those of ``LoaderOptions``.

        Rank ``r`` of ``w`` gets rows ``r b / w`` to ``(r + 1) b / w`` of every global batch of
        ``b``, augmented exactly as one process would.

        Raises:
            UserError: for a view that the data set does not define.
        """
        for view in views:
            if view not in self.view_names:
                names = ", ".join(self.view_names) or "none"
                raise UserError(f"dataset.views has no {view!r}, which the method needs: {names}")
        options = LoaderOptions(
            batch_size=batch_size,
            device=device,
            seed=seed,
            rank=rank,
            world_size=world_size,
            views=tuple(views),
            augment=augment,
            shuffle=shuffle,
            drop_last=drop_last,
            dtype=dtype,
            channels_last=channels_last,
        )
        return self.loader("train", options)

    def validation(
        self,
        *,
        batch_size: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Loader:
        """The validation split in stored order, without augmentation."""
        return self.loader(
            "validation",
            LoaderOptions(
                batch_size=batch_size,
                device=device,
                rank=rank,
                world_size=world_size,
                dtype=dtype,
                channels_last=channels_last,
            ),
        )

    def test(
        self,
        *,
        batch_size: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Loader:
        """The test split in stored order, without augmentation."""
        return self.loader(
            "test",
            LoaderOptions(
                batch_size=batch_size,
                device=device,
                rank=rank,
                world_size=world_size,
                dtype=dtype,
                channels_last=channels_last,
            ),
        )


class ResidentDataModule(DataModule):
    """A data set that fits in the memory of the device; a subclass says how to ``load`` it.

    Args:
        val_fraction: share of train held out for validation where the set brings none.
        normalisation: from stored values to inputs.
        augmentation: of training inputs.
        views: further augmented views by name.
        mix: mixes the samples of training batches.
    """

    def __init__(
        self,
        *,
        val_fraction: float,
        normalisation: Normalisation | None,
        augmentation: Augmentation | None,
        views: dict[str, Augmentation] | None,
        mix: Mix | None = None,
    ) -> None:
        self.val_fraction = val_fraction
        self.normalisation = normalisation
        self.augmentation = augmentation
        self.views = dict(views or {})
        self.mix = mix
        self._parts: dict[str, Samples] = {}
        self._on_device: dict[tuple[str, str], Samples] = {}
        self._fingerprint = ""

    @abstractmethod
    def load(self) -> dict[str, Samples]:
        """``train`` and ``test`` on the CPU, and ``validation`` where the set brings its own.

        Sets ``num_classes`` and ``class_names``.
        """

    def select(self, train: Samples) -> Tensor:
        """Rows of the training split that are used; a subclass may leave some out."""
        return torch.arange(len(train))

    def prepare(self, protocol: Protocol = "holdout") -> None:
        """Load, split, and keep the parts on the CPU until a loader asks for a device."""
        self._on_device.clear()
        loaded = self.load()
        train, test = loaded["train"], loaded["test"]
        if protocol == "paper":
            validation = test
        elif "validation" in loaded:
            validation = loaded["validation"]
        else:
            held_out, rest = stratified(
                train.target, round(self.val_fraction * len(train)), seed=SPLIT_SEED
            )
            train, validation = train.take(rest), train.take(held_out)
        train = train.take(self.select(train))
        self._parts = {"train": train, "validation": validation, "test": test}
        self.input_shape = tuple(train.inputs.shape[1:])
        self.train_size, self.validation_size, self.test_size = map(len, self._parts.values())
        self._fingerprint = self._hash()

    @property
    def fingerprint(self) -> str:
        """Hash of the arrays, the splits and the preprocessing."""
        return self._fingerprint

    @property
    def view_names(self) -> tuple[str, ...]:
        """The keys of ``views``."""
        return tuple(self.views)

    def loader(self, part: str, options: LoaderOptions) -> ResidentLoader:
        """Batches of a part that lives on ``options.device``."""
        changes = options.augment and self.augmentation is not None
        return ResidentLoader(
            self._resident(part, options.device),
            options,
            normalisation=self.normalisation,
            augmentation=self.augmentation
            if changes and self.augmentation.changes_images
            else None,
            views={name: self.views[name] for name in options.views},
            mix=self.mix if options.augment else None,
            num_classes=self.num_classes,
        )

    def _resident(self, part: str, device: torch.device | str) -> Samples:
        """A part on a device, sent there once for all loaders."""
        key = (part, str(device))
        if key not in self._on_device:
            self._on_device[key] = self._parts[part].to(device)
        return self._on_device[key]

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name, part in self._parts.items():
            digest.update(name.encode())
            for tensor in (part.inputs, part.target, part.index):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy())
        digest.update(repr((self.normalisation, self.augmentation, self.views, self.mix)).encode())
        return digest.hexdigest()
