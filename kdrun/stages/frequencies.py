"""The stage that shows what of a graph network's knowledge has reached the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kdrun.errors import UserError
from kdrun.evaluation import evaluation_device
from kdrun.losses.edges import difference_divergence, frequency_parts, neighbour_similarity
from kdrun.parameters import Positive
from kdrun.stages.distil import assemble_run
from kdrun.stages.evaluate import trained_networks
from kdrun.stages.stage import Context, Stage

REFERENCE = "teacher"
COLUMNS = {
    "difference_divergence": "divergence of differences from the teacher's",
    "neighbour_similarity": "similarity of neighbours",
    "high_share": "share of high frequencies",
}
"""The measures and what they are called in the table."""


class Frequencies(Stage):
    """How smooth each network's logits are along the edges of the graph of the test split.

    Measured in evaluation mode, for every network after its last epoch and at its best one:
    ``difference_divergence`` from the teacher (``kdrun.losses.edges``), ``neighbour_similarity``,
    the mean cosine of two neighbours' logits, and ``high_share``, the share of the high-frequency
    part in the squared norm of both parts of the logits.

    Args:
        temperature: of the divergence.
    """

    def __init__(self, *, temperature: Positive = 1.5) -> None:
        self.temperature = temperature

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Print the measures and leave them in ``context.result``."""
        assembly = assemble_run(context)
        if REFERENCE not in assembly.teachers:
            raise UserError(f"{name}: the method has no {REFERENCE} to compare with")
        device = evaluation_device(context.config["trainer"]["accelerator"])
        batch = next(iter(context.data.test(batch_size=1, device=device)))
        if not isinstance(batch.inputs, Mapping) or "edge_index" not in batch.inputs:
            raise UserError(f"{name}: batches of this data set have no edge_index")
        edges, logits = batch.inputs["edge_index"], dict[str, Tensor]()
        for label, network in trained_networks(context, assembly).items():
            with torch.no_grad():
                logits[label] = context.task.forward(network.to(device).eval(), batch).logits
            network.cpu()
        measured = {
            label: self.measures(values, logits[REFERENCE], edges)
            for label, values in logits.items()
        }
        context.result[name] = measured
        context.console.say(_table(measured))

    def measures(self, logits: Tensor, teacher: Tensor, edge_index: Tensor) -> dict[str, float]:
        """The three measures of logits ``(N, C)``."""
        low, high = (part.square().sum() for part in frequency_parts(logits, edge_index))
        difference = difference_divergence(
            logits, teacher, edge_index, temperature=self.temperature
        )
        values = (difference, neighbour_similarity(logits, edge_index), high / (low + high))
        return dict(zip(COLUMNS, map(float, values), strict=True))


def _table(measured: Mapping[str, Mapping[str, float]]) -> str:
    width = max(map(len, measured))
    lines = ["", "  ".join([" " * width, *COLUMNS.values()])]
    for label, values in measured.items():
        cells = [f"{values[key]:.4f}".rjust(len(title)) for key, title in COLUMNS.items()]
        lines.append("  ".join([label.ljust(width), *cells]))
    return "\n".join(lines)
