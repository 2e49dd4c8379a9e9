"""Any data set with labels for few of its training samples, and the class names as text."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from kdrun.data.captions import Captions
from kdrun.data.loader import Loader, LoaderOptions
from kdrun.data.module import SPLIT_SEED, DataModule, EvaluationProtocol, Part
from kdrun.data.paired import PairedLoader
from kdrun.data.seeding import stream, stream_seed
from kdrun.data.splits import per_class, stratified
from kdrun.errors import UserError
from kdrun.parameters import Interval, NonNegativeInt, PositiveInt

POOL = 4
"""What the random streams of unlabelled samples are for; see ``kdrun.data.loader``."""


@runtime_checkable
class HidesLabels(Protocol):
    """Samples that can be served without their labels."""

    def without_labels(self) -> Part:
        """The same samples with -1 for each target, so that nothing can read it."""


class PartlyLabelled(DataModule):
    """A data set of which ``shots`` images of each class, or ``percent`` of all, have labels.

    The others are unlabelled: their batches carry -1 for each target, and only ``with_labels`` of
    their numbers gives a data set that knows more.

    Pairs of batches are made in one of four ways. ``zip``: an epoch ends with the shorter of the
    two sets. ``cycle_labelled``: an epoch is a pass over the unlabelled set, and the labelled one
    starts over when it is through. ``cycle_unlabelled``: the other way round.
    ``with_replacement``: full batches drawn from the labelled set with replacement, ``steps`` an
    epoch, while the unlabelled set is gone through again and again.

    Args:
        data: the data set.
        shots: labelled images of each class; null: ``percent`` says how many.
        percent: labelled share of train in percent, the classes in their proportions.
        label_seed: of the choice of labelled images; null: the seed of the run.
        unlabelled_limit: use so many unlabelled images only, drawn once; null: all.
        pairs: ``zip``, ``cycle_labelled``, ``cycle_unlabelled`` or ``with_replacement``.
        steps: batches of an epoch, for ``with_replacement``; null: so many that an epoch draws as
            many labelled images as there are.
        names: of the classes in sentences; null: the data set's.
        templates: sentences about an image, with ``{}`` for the name of its class.
        captions: of images set aside, for a vision-language model that is trained here.
    """

    def __init__(
        self,
        *,
        data: DataModule,
        shots: PositiveInt | None = 1,
        percent: Annotated[float, Interval(0, 100, low_open=True)] | None = None,
        label_seed: NonNegativeInt | None = None,
        unlabelled_limit: PositiveInt | None = None,
        pairs: Literal["zip", "cycle_labelled", "cycle_unlabelled", "with_replacement"] = "zip",
        steps: PositiveInt | None = None,
        names: list[str] | None = None,
        templates: list[str] = ("a photo of a {}.",),
        captions: Captions | None = None,
    ) -> None:
        if (shots is None) == (percent is None):
            raise ValueError("give one of shots and percent, and null for the other")
        if steps is not None and pairs != "with_replacement":
            raise ValueError(f"steps has a meaning only with pairs=with_replacement, not {pairs}")
        if not templates or any("{}" not in template for template in templates):
            raise ValueError("templates must be sentences with {} where the class's name goes")
        super().__init__(val_fraction=data.val_fraction, preprocessing=data.preprocessing)
        self.data, self.task, self.task_arguments = data, data.task, data.task_arguments
        self.shots, self.percent, self.label_seed = shots, percent, label_seed
        self.unlabelled_limit = unlabelled_limit
        self.pairs, self.steps = pairs, steps
        self.names, self.templates, self.captions = names, templates, captions

    def load(self) -> dict[str, Part]:
        """The parts of the data set, its classes named for sentences."""
        parts = self.data.load()
        self.class_names = self._named(self.data.class_names)
        return parts

    def select(self, train: Part) -> Tensor:
        """What the data set itself leaves out."""
        return self.data.select(train)

    def _named(self, given: list[str]) -> list[str]:
        names = given if self.names is None else list(self.names)
        if len(names) != len(given):
            raise UserError(
                f"dataset.names: {len(names)} names for {len(given)} classes, which leaves "
                "some class without a prompt"
            )
        for number, name in enumerate(names):
            if not name.strip():
                raise UserError(f"dataset.names: class {number} has no name, so it has no prompt")
        return names

    def prepare(self, protocol: EvaluationProtocol = "holdout") -> None:
        """Load the data, make the splits, set images with captions aside, choose the labelled.

        Raises:
            UserError: there are fewer images than are asked for.
        """
        super().prepare(protocol)
        train = self._parts["train"]
        if not isinstance(train, HidesLabels):
            raise UserError("dataset: labels can be hidden of images and tables only")
        if self.captions is not None:
            train = self._set_aside(train, self.captions)
        self._parts["train"], self.train_size = train, len(train)
        self.draw_labels(0)

    def _set_aside(self, train: Part, captions: Captions) -> Part:
        if captions.count >= len(train):
            raise UserError(
                f"dataset.captions.count={captions.count}: there are {len(train)} training images, "
                "and some must be left"
            )
        told, rest = stratified(train.target, captions.count, seed=SPLIT_SEED)
        captioned = train.take(told)
        try:
            target = captions.classes(captioned.target, self.num_classes)
        except ValueError as error:
            raise UserError(f"dataset.captions: {error}") from error
        self._captioned = _with_target(captioned, target)
        return train.take(rest)

    @property
    def for_teacher(self) -> DataModule:
        """The images with captions where there are some, the class that each names as target."""
        if self.captions is None:
            return self
        other = copy.copy(self)
        other.captions = None
        other._parts = {name: self._parts[name] for name in ("validation", "test")}
        other._parts["train"], other.train_size = self._captioned, len(self._captioned)
        return other

    # -- who has a label -------------------------------------------------------------------------

    def draw_labels(self, seed: int) -> None:
        """Choose the labelled images of a run with ``seed``, unless there is a ``label_seed``.

        Raises:
            UserError: more labels are asked for than there are images.
        """
        seed = seed if self.label_seed is None else self.label_seed
        train = self._parts["train"]
        if self.shots is not None:
            try:
                rows = per_class(train.target, self.shots, seed=seed)
            except ValueError as error:
                raise UserError(f"dataset.shots={self.shots}: {error}") from error
        else:
            count = max(1, round(len(train) * self.percent / 100))
            rows = stratified(train.target, count, seed=seed)[0]
        self._pool: Tensor | None = None
        labelled = train.index[rows]
        unlabelled = train.index[~torch.isin(train.index, labelled)]
        if self.unlabelled_limit is not None:
            order = torch.randperm(len(unlabelled), generator=stream(seed, POOL))
            self._pool = unlabelled[order[: self.unlabelled_limit]]
        self._divide(labelled)

    def with_labels(self, index: Tensor) -> PartlyLabelled:
        """The same data with labels for the samples of these numbers, and for no others."""
        other = copy.copy(self)
        other._parts = dict(self._parts)
        other._divide(index)
        return other

    def _divide(self, labelled: Tensor) -> None:
        train = self._parts["train"]
        known = torch.isin(train.index, labelled)
        pool = ~known if self._pool is None else ~known & torch.isin(train.index, self._pool)
        self._parts["labelled"] = train.take(known.nonzero().flatten())
        self._parts["unlabelled"] = train.take(pool.nonzero().flatten()).without_labels()

    @property
    def labelled(self) -> Part:
        """The samples with labels."""
        return self._parts["labelled"]

    @property
    def unlabelled(self) -> Part:
        """The samples without."""
        return self._parts["unlabelled"]

    # -- what a run sees -------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """As of any data set, with what is said of the classes and how batches are paired."""
        text = f"{super().fingerprint} {self.pairs} {self.steps} {self.prompts}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def labelled_size(self) -> int:
        """Samples with labels."""
        return len(self._parts.get("labelled", self._parts["train"]))

    def batches(self, batch_size: int) -> int:
        """Batches in an epoch, as ``pairs`` says."""
        if "labelled" not in self._parts:
            return super().batches(batch_size)
        known, pool = (-(-len(part) // batch_size) for part in (self.labelled, self.unlabelled))
        return {
            "zip": max(1, min(known, pool)),
            "cycle_labelled": max(1, pool),
            "cycle_unlabelled": known,
            "with_replacement": self.steps or known,
        }[self.pairs]

    def paired(self, pairs: str, steps: int | None) -> PartlyLabelled:
        """The same data, its batches paired in another way."""
        other = copy.copy(self)
        other.pairs, other.steps = pairs, steps
        return other

    @property
    def has_unlabelled(self) -> bool:
        """Whether not every training sample has a label."""
        return len(self._parts.get("unlabelled", ())) > 0

    def samples_at(self, position: int, batch_size: int) -> int:
        """Labelled samples in batch ``position`` of an epoch, over all ranks."""
        if "labelled" not in self._parts:
            return super().samples_at(position, batch_size)
        if self.pairs == "with_replacement":
            return batch_size
        batches = -(-self.labelled_size // batch_size)
        return min(batch_size, self.labelled_size - position % batches * batch_size)

    def training_loader(self, options: LoaderOptions, unlabelled: bool) -> Loader:
        """Labelled batches, with unlabelled ones beside them where they are wanted.

        Raises:
            UserError: they are wanted, but every sample has a label; or labels are to be mixed.
        """
        if "labelled" not in self._parts or not options.shuffle:
            name = "labelled" if "labelled" in self._parts else "train"
            return self.loader(name, options)
        if unlabelled and not len(self.unlabelled):
            raise UserError("every training sample has a label")
        mix = self.preprocessing.mix
        if unlabelled and mix and mix.mixes and mix.target == "soft":
            raise UserError(
                "dataset.data.mix.target=soft mixes labels, which the unlabelled samples lack: set "
                "it to first, or mix nothing"
            )
        beside = replace(options, seed=stream_seed(options.seed, POOL), drop_last=False)
        steps = self.batches(options.batch_size)
        if self.pairs == "with_replacement":
            options = replace(options, draws=steps * options.batch_size)
        return PairedLoader(
            self.loader("labelled", options),
            self.loader("unlabelled", beside) if unlabelled else None,
            steps=steps,
            restart=self.pairs == "zip",
        )


def _with_target(part: Part, target: Tensor) -> Part:
    """The same samples with other targets."""
    other = part.without_labels()
    other.target = target
    return other
