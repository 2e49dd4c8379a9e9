"""The stage that holds a search's scores against accuracies that were published."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from kdrun.architectures.ranking import correlations, published_depths
from kdrun.errors import UserError
from kdrun.stages.search import HISTORY
from kdrun.stages.stage import Context, Stage

COLUMNS = {
    "semantic": "semantic score",
    "relation": "relation score",
    "sum": "their sum",
    "gradient_norm": "norm of the classifier's gradient",
    "parameters": "number of parameters",
    "multiply_adds": "multiply-adds",
    "layers": "depth",
}
"""What is ranked, and what it is called; the last four need no comparison with a teacher."""


class PublishedRanking(Stage):
    """Rank correlation of scores, and of plain sizes, with 64 distilled ResNets on CIFAR-100.

    Needs a search over the blocks in the three stages of ResNets (``published_depths``). Nothing
    is trained: the accuracies are those of DisWOT's authors.

    Args:
        search: the stage whose candidates are looked at.
    """

    def __init__(self, *, search: str = "search") -> None:
        self.search = search

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Print the correlations and leave them in ``context.result``."""
        published = published_depths()
        with context.artefacts[self.search].path(HISTORY).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        truth, measured = [], {column: [] for column in COLUMNS}
        for row in rows:
            option, _, value = row["words"].partition("=")
            blocks = tuple(json.loads(value)) if option == "student.blocks" else ()
            if blocks not in published:
                raise UserError(
                    f"{name}: no accuracy was published for {row['words']}; the search must be "
                    "over student.blocks, three numbers of 1, 3, 5 or 7"
                )
            truth.append(published[blocks][1])
            row["sum"] = float(row["semantic"]) + float(row["relation"])
            for column, values in measured.items():
                values.append(float(row[column]))
        found = {column: correlations(values, truth) for column, values in measured.items()}
        context.result |= {name: found, "networks": {}, "objective": found["sum"]["spearman"]}
        best = max(published, key=lambda blocks: published[blocks][1])
        lines = ["", f"rank correlation with the distilled accuracy of {len(rows)} networks"]
        lines.append(f"{'':36}spearman  kendall  pearson")
        for column, values in found.items():
            numbers = "  ".join(f"{value:7.3f}" for value in values.values())
            lines.append(f"{COLUMNS[column]:36} {numbers}")
        lines.append(f"best published student: blocks {list(best)}, {published[best][1]:.2f}")
        context.console.say("\n".join(lines))
