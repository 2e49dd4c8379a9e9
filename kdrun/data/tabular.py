"""Small tables that ship with scikit-learn: measurements in, class out."""

from __future__ import annotations

from typing import Literal

import torch

from kdrun.data.batches import Preprocessing
from kdrun.data.bundled import bundled_table
from kdrun.data.module import SPLIT_SEED, DataModule
from kdrun.data.normalise import Normalisation
from kdrun.data.resident import Samples
from kdrun.data.splits import stratified
from kdrun.parameters import ProperFraction

FILES = {
    "wine": "wine_data.csv",
    "breast_cancer": "breast_cancer.csv",
    "iris": "iris.csv",
}


class Tabular(DataModule):
    """One bundled table; columns are standardised with the statistics of all but the test rows.

    Args:
        name: ``wine`` (178 x 13, 3 classes), ``breast_cancer`` (569 x 30, 2) or ``iris``
            (150 x 4, 3).
        test_fraction: share of the rows in the fixed stratified test set.
        val_fraction: share of the other rows held out for validation.
    """

    def __init__(
        self,
        *,
        name: Literal["wine", "breast_cancer", "iris"] = "wine",
        test_fraction: ProperFraction = 0.3,
        val_fraction: ProperFraction = 0.15,
    ) -> None:
        super().__init__(val_fraction=val_fraction, preprocessing=Preprocessing())
        self.name = name
        self.test_fraction = test_fraction

    def load(self) -> dict[str, Samples]:
        """The fixed test rows and the others."""
        table, header = bundled_table(FILES[self.name], header_lines=1)
        self.class_names = header[2:]  # after the numbers of rows and columns
        inputs = torch.from_numpy(table[:, :-1]).float()
        target = torch.from_numpy(table[:, -1]).long()
        everything = Samples(inputs, target, torch.arange(len(target)))
        test, rest = stratified(target, round(self.test_fraction * len(target)), seed=SPLIT_SEED)
        train = everything.take(rest)
        self.preprocessing = Preprocessing(
            Normalisation(
                train.inputs.mean(0).tolist(), train.inputs.std(0).tolist(), value_range=1.0
            )
        )
        return {"train": train, "test": everything.take(test)}
