"""What a data set offers to a run: its splits, as loaders, and a fingerprint of its content."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kdrun.data.batches import Preprocessing, Shape
from kdrun.data.loader import AugmentationCycle, Loader, LoaderOptions
from kdrun.data.splits import stratified
from kdrun.errors import UserError
from kdrun.parameters import checked_constructor

EvaluationProtocol = Literal["holdout", "paper"]
"""``holdout``: validation is carved out of train and the test set is touched once, at the end.
``paper``: train is all of train and validation is the test set, as most published numbers were
made."""

SPLIT_SEED = 0
"""Splits are part of a data set, not of an experiment: the same for every seed of a run."""


class Part(Protocol):
    """The samples of one split: ``Samples`` in memory, or files that are read when needed."""

    target: Tensor
    index: Tensor
    content: str

    def __len__(self) -> int:
        """Number of samples."""

    @property
    def shape(self) -> Shape:
        """The shape of one input; by name where there are several."""

    def take(self, rows: Tensor) -> Part:
        """The given rows as a part of their own."""

    def serve(self, options: LoaderOptions, preprocessing: Preprocessing) -> Loader:
        """Batches of these samples."""


class DataModule(ABC):
    """A data set with its preprocessing; a subclass says how to ``load`` it.

    Call ``prepare`` first; all but ``task`` is known afterwards.

    Attributes:
        task: what the targets are for.
        reads_classes: inputs are class ids as well, the tokens of a vocabulary.
        single_batch: a batch is always the whole split, which cannot be divided (one graph).
        num_classes: number of classes.
        input_shape: one input, ``(C, H, W)`` or ``(D,)``; by name where there are several.
        class_names: the names, by class id.
        train_size: samples in the training split; likewise ``validation_size``, ``test_size``.
        task_arguments: arguments of the task's constructor that only the data set knows.
        templates: sentences about a sample, with ``{}`` for its class, for networks that read text.

    Args:
        val_fraction: share of train held out for validation where the set brings none.
        preprocessing: from stored samples to inputs.
    """

    task: str = "classification"
    reads_classes: bool = False
    single_batch: bool = False
    num_classes: int
    input_shape: Shape
    class_names: list[str]
    train_size: int
    validation_size: int
    test_size: int
    task_arguments: Mapping[str, Any] = MappingProxyType({})
    templates: Sequence[str] = ("a photo of a {}.",)

    def __init__(self, *, val_fraction: float, preprocessing: Preprocessing) -> None:
        self.val_fraction = val_fraction
        self.preprocessing = preprocessing
        self._parts: dict[str, Part] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__init__ = checked_constructor(cls.__init__)

    @abstractmethod
    def load(self) -> dict[str, Part]:
        """``train`` and ``test``, and ``validation`` where the set brings its own.

        Sets ``class_names``.
        """

    def select(self, train: Part) -> Tensor:
        """Rows of the training split that are used; a subclass may leave some out."""
        return torch.arange(len(train))

    def judged(self, part: Part) -> Part:
        """What is used of the validation or test split; a subclass may leave some out."""
        return part

    def evaluation_batch_size(self, training: int) -> int:
        """Samples that are evaluated at once, given how many are trained on at once."""
        return max(256, training)

    def draw_labels(self, seed: int) -> None:  # noqa: B027 - most data sets know all labels
        """Choose the samples whose labels a run with ``seed`` knows, where that is not all."""

    def prepare(self, protocol: EvaluationProtocol = "holdout") -> None:
        """Load the data and make the splits."""
        loaded = self.load()
        train, test = loaded["train"], loaded["test"]
        if protocol == "paper":
            validation = test
        elif "validation" in loaded:
            validation = loaded["validation"]
        else:
            count = round(self.val_fraction * len(train))
            held_out, rest = stratified(train.target, count, seed=SPLIT_SEED)
            train, validation = train.take(rest), train.take(held_out)
        train = train.take(self.select(train))
        for name, part in (("train", train), ("validation", validation), ("test", test)):
            if not len(part):
                raise UserError(f"the {name} split is empty; see dataset.val_fraction")
        validation, test = self.judged(validation), self.judged(test)
        self._parts = {"train": train, "validation": validation, "test": test}
        self.num_classes = len(self.class_names)
        if self.task == "classification" and self.num_classes < 2:
            raise UserError(
                f"there is one class only, {self.class_names[0]!r}: nothing to tell apart"
            )
        for name, part in self._parts.items():
            self._check_labels(name, part.target)
        self.input_shape = train.shape
        self.train_size, self.validation_size, self.test_size = map(len, self._parts.values())
        self.preprocessing = replace(self.preprocessing, num_classes=self.num_classes)

    def _check_labels(self, name: str, target: Tensor) -> None:
        """Class ids that no class has would end in an error of an index, or on a GPU in a crash."""
        if self.task != "classification" or target.is_floating_point() or target.ndim != 1:
            return
        outside = (target < 0) | (target >= self.num_classes)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise UserError(
                f"sample {int(self._parts[name].index[row])} of the {name} split has the class "
                f"{int(target[row])}, but there are {self.num_classes} classes, numbered from 0"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines a batch but its seed and size.

        Content, splits, normalisation and augmentation; equal wherever the data are equal.
        """
        if not self._parts:
            raise RuntimeError("prepare the data set before asking for its fingerprint")
        digest = hashlib.sha256(repr(self.preprocessing).encode())
        for name, part in self._parts.items():
            digest.update(f"{name} {part.content} {part.shape}".encode())
            digest.update(part.target.numpy().tobytes() + part.index.numpy().tobytes())
        return digest.hexdigest()

    @property
    def labelled_size(self) -> int:
        """Training samples whose labels may be learned from."""
        return self.train_size

    @property
    def has_unlabelled(self) -> bool:
        """Whether there are training samples without labels."""
        return False

    @property
    def prompts(self) -> list[list[str]]:
        """Every template filled in with each class's name, by class id."""
        names = [name.replace("_", " ") for name in self.class_names]
        return [[template.format(name) for template in self.templates] for name in names]

    def with_train(self, train: Part) -> DataModule:
        """This data set with other training samples; validation and test stay."""
        other = copy.copy(self)
        other._parts = self._parts | {"train": train}
        other.train_size = len(train)
        return other

    @property
    def for_teacher(self) -> DataModule:
        """What a teacher that is made here is trained on."""
        return self

    def batches(self, batch_size: int) -> int:
        """Batches in an epoch of training."""
        return -(-self.train_size // batch_size)

    def samples_at(self, position: int, batch_size: int) -> int:
        """Training samples in batch ``position`` of an epoch, over all ranks."""
        return min(batch_size, self.train_size - position * batch_size)

    @property
    def signature(self) -> dict[str, str]:
        """What a network that is trained on this set takes for granted, as JSON by name.

        ``classes``: their number and names in order; ``normalisation``: of the inputs.
        """
        names = [str(name) for name in self.class_names]
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        classes = {"count": len(names), "first": names[:3], "sha256": digest}
        found = {"classes": json.dumps(classes)}
        normalisation = self.preprocessing.normalisation
        if normalisation is not None:
            facts = {"mean": list(normalisation.mean), "std": list(normalisation.std)}
            found["normalisation"] = json.dumps(facts)
        return found

    @property
    def view_names(self) -> tuple[str, ...]:
        """The further augmented views that can be asked of the training split."""
        return tuple(self.preprocessing.views)

    def loader(self, part: str, options: LoaderOptions) -> Loader:
        """One split, ``train``, ``validation`` or ``test``, served as ``options`` say."""
        return self._parts[part].serve(options, self.preprocessing)

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
        cycle: AugmentationCycle | None = None,
        unlabelled: bool = False,
    ) -> Loader:
        """The training split; the arguments are those of ``LoaderOptions``, and ``unlabelled``:
        whether batches bring samples without labels as well.

        Rank ``r`` of ``w`` gets rows ``r b / w`` to ``(r + 1) b / w`` of every global batch of
        ``b``, augmented exactly as one process would.

        Raises:
            UserError: for a view that the data set does not define, or where all samples have
                labels and some without are wanted.
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
            cycle=cycle,
        )
        return self.training_loader(options, unlabelled)

    def training_loader(self, options: LoaderOptions, unlabelled: bool) -> Loader:
        """The training split, with or without unlabelled samples beside the labelled ones."""
        if unlabelled:
            raise UserError("this data set has no samples without labels")
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
