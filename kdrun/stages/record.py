"""The stage that records a frozen teacher's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from kdrun import distributed
from kdrun.assembly import Assembly, moved, sample_batch
from kdrun.data.loader import LoaderOptions
from kdrun.evaluation import evaluation_device
from kdrun.recording import (
    describe,
    encode_views,
    is_written,
    refuse_without_space,
    write_augmentation,
)
from kdrun.sizes import in_words
from kdrun.stages.distil import assemble_run
from kdrun.stages.recorded import (
    ENTRY,
    computing_dtype,
    cycle_of,
    description,
    encoding_of,
    live_teacher,
    refuse_unrecordable,
)
from kdrun.stages.stage import Context, Stage
from kdrun.stages.training import data_seed

Pieces = Iterator[tuple[slice, Mapping[str, Tensor]]]


class RecordTeacher(Stage):
    """The teacher's outputs on every training sample, for ``teacher.cache_views`` augmentations.

    Runs with the same teacher, data, augmentation seed and encoding read them and never run the
    teacher in training, whatever their student, seed and method: ``logits`` and ``topk`` serve all
    methods that read no more, ``features`` those that tap the teacher alike.
    """

    kind: ClassVar[str] = "teacher_outputs"
    shared: ClassVar[bool] = True

    def wanted(self, context: Context) -> bool:
        """Only with ``teacher.cache``."""
        return context.config[ENTRY]["cache"] != "none"

    def key(self, context: Context) -> dict[str, Any]:
        """Teacher, data with their transform, augmentations, encoding and precision."""
        return description(context, self._assembly(context))

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Run the teacher over the training set, once per augmentation; ranks share each batch."""
        assembly = self._assembly(context)
        recorder = _Recorder(context, assembly)
        cycle = recorder.cycle
        sample = recorder.sample()
        size = sum(values[0].nbytes for values in sample.values()) * recorder.rows
        context.console.say(
            f"{name}: {context.config[ENTRY]['cache']} of {recorder.rows:,} samples under "
            f"{cycle.length} augmentations, {in_words(size * cycle.length)}"
        )
        missing = distributed.broadcast(
            [
                number
                for number in range(cycle.length)
                if not is_written(directory, number, recorder.rows, sample)
            ]
        )
        if distributed.rank() == 0:
            refuse_without_space(directory, size * len(missing))
            describe(directory, description(context, assembly))
        for number in missing:
            write_augmentation(directory, number, recorder.rows, recorder.pieces(number))

    def _assembly(self, context: Context) -> Assembly:
        # In the form in which the teacher would run: cheaper where that is asked for.
        assembly = assemble_run(context, training=True)
        node = context.config[ENTRY]
        refuse_unrecordable(node, assembly.method, context.data.num_classes)
        return assembly


class _Recorder:
    """The teacher, and the batches that it is run on."""

    def __init__(self, context: Context, assembly: Assembly) -> None:
        self.watch, self.data = context.watch, context.data
        self.views = assembly.method.views
        self.cycle, self.encoding = cycle_of(context), encoding_of(context, assembly)
        self.device = evaluation_device(context.config["trainer"]["accelerator"])
        self.run = live_teacher(context, assembly, self.device)
        self.dtype = computing_dtype(context)
        batch_size = context.config["training"]["batch_size"]
        # Methods that learn from samples without labels have no recorded teacher.
        self.rows, limit = context.data.labelled_size, context.limit_batches
        only_first = limit is not None and limit * batch_size < self.rows
        if only_first:  # A trial needs only the batches that it will train on.
            self.rows = limit * batch_size
        else:
            batch_size = context.data.evaluation_batch_size(batch_size)
        self.options = LoaderOptions(
            batch_size=batch_size,
            seed=data_seed(context.config, "student", context.config["seed"]),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            shuffle=only_first,
        )

    def sample(self) -> dict[str, Tensor]:
        """The arrays of a few samples."""
        batch = sample_batch(self.data, self.views, self.dtype)
        return encode_views(self.encoding, self.run(moved(batch, str(self.device))))

    def pieces(self, number: int) -> Pieces:
        """This rank's rows of one augmentation and their arrays, batch by batch."""
        options = self.options
        loader = self.data.train(
            batch_size=options.batch_size,
            seed=options.seed,
            device=self.device,
            rank=options.rank,
            world_size=options.world_size,
            views=self.views,
            shuffle=options.shuffle,
            dtype=self.dtype,
            cycle=self.cycle,
        )
        loader.set_epoch(number)
        for position, batch in zip(range(options.batches(self.rows)), loader, strict=False):
            if options.world_size == 1:
                self.watch.raise_if_received()
            if len(batch):
                arrays = encode_views(self.encoding, self.run(batch))
                index = {"index": batch.index} if number == 0 else {}
                yield slice(*options.bounds(self.rows, position)), arrays | index
