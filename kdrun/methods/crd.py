"""Contrastive representation distillation (Tian, Krishnan, Isola; ICLR 2020).

The student's and the teacher's embedding of the same sample shall be told from those of samples of
other classes, by noise-contrastive estimation against K negatives (arXiv 1910.10699, equations
17-19):

    L = CE + weight * (NCE(e_s against the teacher's bank) + NCE(e_t against the student's bank))
    x = exp(e . bank row / temperature) / Z,   e = linear embedding of v, scaled to unit norm

with penultimate vectors v ``(B, D)`` and both embeddings trained with the student. A bank holds one
row ``(dimension,)`` per training sample, found by the sample's index; a row moves towards the
sample's embedding with momentum, after the step that compared with it. Z is the first batch's mean
times the number of samples and constant from then on. Negatives are drawn without replacement,
unless there is a class that leaves fewer than K.

The similarity to every row of a bank is computed, and the drawn ones picked from it: time and
memory go with batch times data set, not with batch times K times ``dimension``. Negatives come from
the global random generator. With several ranks each compares its own batch; the banks take the
embeddings of all ranks and so stay equal on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun.losses import distributed
from kdrun.losses.contrastive import noise_contrastive_estimation
from kdrun.losses.precision import full_precision
from kdrun.method import Method, Taps
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive, PositiveInt, ProperFraction


class CRD(Method):
    """Tell the teacher's embedding of the same sample from those of other classes.

    Args:
        dimension: width of the embeddings and of the banks.
        negatives: K, samples of other classes that each sample is told from.
        temperature: of the similarities.
        momentum: share of a bank row that stays when it is updated.
        weight: factor of the contrastive term.
        supervised_weight: factor of the task's own loss.
    """

    ordered = True

    def __init__(
        self,
        *,
        dimension: PositiveInt = 128,
        negatives: PositiveInt = 16384,
        temperature: Positive = 0.07,
        momentum: ProperFraction = 0.5,
        weight: NonNegative = 0.8,
        supervised_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.dimension = dimension
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.weight = weight
        self.supervised_weight = supervised_weight
        self._compared: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def taps(self) -> Taps:
        """Penultimate vectors of both."""
        return {"student": ("penultimate",), "teacher": ("penultimate",)}

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build both embeddings."""
        width = student.features["penultimate"].shape[1]
        teacher_width = teachers["teacher"].features["penultimate"].shape[1]
        self.student_embedding = nn.Linear(width, self.dimension)
        self.teacher_embedding = nn.Linear(teacher_width, self.dimension)

    def inspect(self, batches: Iterable[Batch]) -> None:
        """Refuse targets that are no class ids, such as those of mixed samples."""
        if next(iter(batches)).target.ndim != 1:
            raise ValueError("negatives are chosen by class ids: mixup and CutMix must be off")

    def prepare(self, teachers: Mapping[str, nn.Module], loader: Iterable[Batch]) -> None:
        """Number the training samples and lay out the banks."""
        batches = [(batch.index, batch.target) for batch in loader]
        index = distributed.gather(torch.cat([index for index, _ in batches])).cpu()
        label = distributed.gather(torch.cat([label for _, label in batches])).cpu()
        index, order = index.sort()
        samples = len(index)
        self.register_buffer("index", index)
        self.register_buffer("label", label[order])
        largest_class = int(label.bincount().max())
        self.replacement = self.negatives > samples - largest_class
        bound = 1 / math.sqrt(self.dimension / 3)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(samples, self.dimension).uniform_(-bound, bound))
        # Z of both directions; 0 until the first batch has been seen.
        self.register_buffer("normalisers", torch.zeros(2))

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss and the contrastive term, both directions added."""
        ours = self.student_embedding(student.features["penultimate"])
        theirs = self.teacher_embedding(teachers["teacher"].features["penultimate"])
        ours, theirs = normalise(ours), normalise(theirs)
        rows = torch.searchsorted(self.index, batch.index)
        candidates = self.draw(rows)
        terms, estimates = [], []
        for number, (embedding, bank) in enumerate(
            ((ours, self.teacher_bank), (theirs, self.student_bank))
        ):
            scores = similarities(embedding, bank, candidates, temperature=self.temperature)
            estimate = scores.detach().mean() * len(bank)
            known = self.normalisers[number]
            scores = scores / torch.where(known > 0, known, estimate)
            terms.append(
                noise_contrastive_estimation(scores[:, 0], scores[:, 1:], samples=len(bank))
            )
            estimates.append(estimate)
        self._compared.append((rows, ours.detach(), theirs.detach(), torch.stack(estimates)))
        return {
            "supervised": self.supervised_loss(student, batch),
            "contrast": torch.stack(terms).sum(),
        }

    def draw(self, rows: Tensor) -> Tensor:
        """Bank rows to compare with, ``(B, 1 + K)``: the sample's own, then its negatives."""
        other_class = self.label != self.label[rows, None]
        if self.replacement:
            negatives = torch.multinomial(other_class.float(), self.negatives, replacement=True)
        else:
            # All equally likely. torch.multinomial would wait for the device to check its weights.
            lots = torch.rand(other_class.shape, device=rows.device)
            negatives = lots.masked_fill(~other_class, -1).topk(self.negatives).indices
        return torch.cat([rows[:, None], negatives], dim=1)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Fix Z on the first batch; move the rows of the samples that were compared."""
        total, samples = torch.zeros_like(self.normalisers), 0
        for rows, ours, theirs, estimates in self._compared:
            total += distributed.sum_over_ranks(len(rows) * estimates)
            rows = distributed.gather(rows)
            samples += len(rows)
            for bank, embedding in ((self.student_bank, ours), (self.teacher_bank, theirs)):
                kept = self.momentum * bank[rows]
                moved = kept + (1 - self.momentum) * distributed.gather(embedding)
                # A batch that overflowed may be passed over; it must not stay in the bank.
                known = moved.isfinite().all(dim=1, keepdim=True)
                bank[rows] = torch.where(known, F.normalize(moved, dim=1), bank[rows])
        fixed = self.normalisers > 0
        self.normalisers.copy_(torch.where(fixed, self.normalisers, total / samples))
        self._compared = []

    def weights(self, progress: Progress) -> dict[str, float]:
        """Constant factors."""
        return {"supervised": self.supervised_weight, "contrast": self.weight}


@full_precision
def normalise(embedding: Tensor) -> Tensor:
    """Embeddings ``(B, D)`` scaled to unit norm."""
    return F.normalize(embedding, dim=1)


@full_precision
def similarities(
    embedding: Tensor, bank: Tensor, candidates: Tensor, *, temperature: float
) -> Tensor:
    """``exp(embedding . bank row / temperature)`` for the candidate rows.

    Args:
        embedding: ``(B, D)``.
        bank: ``(samples, D)``.
        candidates: rows of the bank ``(B, N)``.
        temperature: of the similarities.

    Returns:
        ``(B, N)``.
    """
    return ((embedding @ bank.T).gather(1, candidates) / temperature).exp()
