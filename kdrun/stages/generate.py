"""The stage in which the teacher writes the text that the student is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor

from kdrun import distributed
from kdrun.data.module import DataModule
from kdrun.data.seeding import stream_seed
from kdrun.data.text import Text
from kdrun.data.tokens import TokenRows
from kdrun.errors import UserError
from kdrun.evaluation import evaluation_device
from kdrun.files import write_atomically
from kdrun.layers.generation import prompts_of, sample
from kdrun.parameters import Positive, PositiveInt
from kdrun.stages.stage import Context, Stage
from kdrun.stages.train import load_network

FILE = "rows.safetensors"
SAY_EVERY = 20
"""Batches between two lines on how far the text has come."""


class GenerateText(Stage):
    """Training rows continued by the teacher: made once, and shared by all runs that need them.

    The prompt of a row is what comes before its first token that counts, or its first
    ``prompt_tokens``. A continuation fills the row, or stops with the tokenizer's end token. Stages
    after this one train on these rows in place of the data set's.

    Args:
        temperature: of the teacher's distribution.
        prompt_tokens: given of a row where all of it counts.
        rows: prompts, the first of the training split; null: all.
    """

    kind: ClassVar[str] = "generated_text"
    shared: ClassVar[bool] = True

    def __init__(
        self,
        *,
        temperature: Positive = 1.0,
        prompt_tokens: PositiveInt = 16,
        rows: PositiveInt | None = None,
    ) -> None:
        self.temperature, self.prompt_tokens, self.rows = temperature, prompt_tokens, rows

    def check(self, config: Mapping[str, Any], data: DataModule) -> None:
        """Refuse what is no text."""
        if not isinstance(data, Text):
            raise UserError(
                "the teacher can write text only: choose a data set such as text_folder"
            )

    def key(self, context: Context) -> dict[str, Any]:
        """Teacher, data and how it is sampled: one draw is for all rows of a batch."""
        return {
            "teacher": context.artefacts["teacher"].name,
            "weights": context.config["teacher"]["weights"],
            "seed": context.config["teacher"]["seed"],
            "batch_size": context.config["training"]["batch_size"],
            "data": context.data.fingerprint,
            "temperature": self.temperature,
            "prompt_tokens": self.prompt_tokens,
            "rows": self.rows,
            "limit_batches": context.limit_batches,
        }

    def run(self, context: Context, name: str) -> None:
        """Make the rows, or find them, and let them take the place of the training split."""
        super().run(context, name)
        if name in context.artefacts:
            arrays = safetensors.torch.load_file(context.artefacts[name].path(FILE))
            context.data = context.data.with_train(TokenRows(**arrays))

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Continue every prompt; ranks take batches in turn, rank 0 writes."""
        arrays = self._written(context, name)
        if distributed.rank() == 0:
            write_atomically(directory / FILE, safetensors.torch.save(arrays))
        distributed.barrier()

    def _written(self, context: Context, name: str) -> dict[str, Tensor]:
        """The rows of all ranks together."""
        parts = distributed.gather_objects(self._continued(context, name))
        batches = dict(sorted(pair for part in parts for pair in part.items())).values()
        tokens = torch.cat([rows for rows, _ in batches])
        counted = torch.cat([marks for _, marks in batches])
        # A row ends with its last token that counts.
        places = torch.arange(tokens.shape[1]).expand_as(counted)
        lengths = torch.where(counted, places, 0).amax(dim=1) + 1
        count = len(tokens) if self.rows is None else min(self.rows, len(tokens))
        return {
            "tokens": tokens[:count].contiguous(),
            "index": torch.arange(count),
            "counted": counted[:count].contiguous(),
            "lengths": lengths[:count].contiguous(),
        }

    def _continued(self, context: Context, name: str) -> dict[int, tuple[Tensor, Tensor]]:
        """This rank's batches by number: tokens ``(B, L + 1)`` and which of them were drawn.

        What is drawn for a batch depends on its number, not on what was drawn before.
        """
        config, data = context.config, context.data
        device = evaluation_device(config["trainer"]["accelerator"])
        teacher = load_network(context, "teacher").to(device)
        batch_size = config["training"]["batch_size"]
        loader = data.train(
            batch_size=batch_size, seed=0, device=device, augment=False, shuffle=False
        )
        batches = len(loader) if context.limit_batches is None else context.limit_batches
        if self.rows is not None:
            batches = min(batches, -(-self.rows // batch_size))
        size = data.input_shape[0] + 1
        made = {}
        for number in range(distributed.rank(), batches, distributed.world_size()):
            if distributed.world_size() == 1:
                context.watch.raise_if_received()
            torch.manual_seed(stream_seed(config["teacher"]["seed"], number))
            batch = loader.replay(0, number)
            prompts, lengths = prompts_of(batch.inputs, batch.mask, self.prompt_tokens)
            tokens, counted = sample(
                teacher,
                prompts,
                lengths,
                new_tokens=size - int(lengths.min()),
                num_classes=data.num_classes,
                temperature=self.temperature,
                end_token=data.tokenizer.end,
                length=size,
            )
            made[number] = tokens[:, :size].int().cpu(), counted[:, :size].cpu()
            if len(made) % SAY_EVERY == 0:
                context.console.say(f"{name}: {number + 1} of {batches} batches written")
        return made
