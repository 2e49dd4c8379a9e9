from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from kdrun.losses.contrastive import noise_contrastive_estimation
from kdrun.methods.crd import CRD, normalise
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, start, train

NOW = Progress(0, 1, 0, 1)


def vectors(samples: int, width: int, seed: int) -> ModelOutput:
    generator = torch.Generator().manual_seed(seed)
    features = {"penultimate": torch.randn(samples, width, generator=generator)}
    return ModelOutput(torch.zeros(samples, 3), features)


def ready(samples: int = 12, **options) -> tuple[CRD, Batch]:
    """A method set up on samples with scattered indices and three classes."""
    torch.manual_seed(0)
    method = CRD(**({"dimension": 8, "negatives": 5} | options))
    method.setup(vectors(2, 4, 0), {"teacher": vectors(2, 6, 1)})
    index = 10 * torch.arange(samples).flip(0)
    data = Batch(torch.zeros(samples, 1), torch.arange(samples) % 3, index)
    method.prepare({}, [data.rows(slice(0, 7)), data.rows(slice(7, samples))])
    return method, data


def step(method: CRD, batch: Batch, seed: int = 2) -> torch.Tensor:
    student, teacher = vectors(len(batch), 4, seed), vectors(len(batch), 6, seed + 1)
    loss = method.losses(student, {"teacher": teacher}, batch, NOW)["contrast"]
    method.after_step(NOW)
    return loss


def test_estimation_by_hand() -> None:
    # c = K / samples = 2 / 4; -log(1 / 1.5) - log(0.5 / 1) - log(0.5 / 0.75)
    value = noise_contrastive_estimation(
        torch.tensor([1.0]), torch.tensor([[0.5, 0.25]]), samples=4
    )
    assert value.item() == pytest.approx(2 * math.log(1.5) + math.log(2), abs=1e-5)


def test_the_loss_is_the_naive_loop() -> None:
    method, data = ready()
    batch = data.rows(slice(0, 4))
    student, teacher = vectors(4, 4, 2), vectors(4, 6, 3)
    torch.manual_seed(1)
    candidates = method.draw(torch.searchsorted(method.index, batch.index))
    ours = method.student_embedding(student.features["penultimate"])
    theirs = method.teacher_embedding(teacher.features["penultimate"])
    expected = 0.0
    for embeddings, bank in ((ours, method.teacher_bank), (theirs, method.student_bank)):
        x = torch.tensor(
            [
                [math.exp(float(e @ bank[r]) / 0.07) for r in row]
                for e, row in zip(normalise(embeddings).detach(), candidates, strict=True)
            ],
            dtype=torch.float64,
        )
        x = x / (x.mean() * 12)
        c = 5 / 12
        expected -= float((x[:, 0] / (x[:, 0] + c)).log().sum() / 4)
        expected -= float((c / (x[:, 1:] + c)).log().sum() / 4)
    torch.manual_seed(1)
    loss = method.losses(student, {"teacher": teacher}, batch, NOW)["contrast"]
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_positive_comes_first_and_negatives_from_other_classes() -> None:
    method, data = ready()
    rows = torch.searchsorted(method.index, data.index)
    assert method.index[rows].tolist() == data.index.tolist()
    assert method.label[rows].tolist() == data.target.tolist()
    candidates = method.draw(rows)
    assert candidates[:, 0].tolist() == rows.tolist()
    for row, negatives in zip(rows, candidates[:, 1:], strict=True):
        assert (method.label[negatives] != method.label[row]).all()
        assert len(set(negatives.tolist())) == 5


def test_negatives_repeat_only_if_there_are_too_few() -> None:
    # Of 12 samples in three classes, 8 are of another class.
    method, data = ready(negatives=8)
    candidates = method.draw(torch.searchsorted(method.index, data.index))
    assert all(len(set(row.tolist())) == 9 for row in candidates)
    method, data = ready(negatives=9)
    candidates = method.draw(torch.searchsorted(method.index, data.index))
    assert candidates.shape == (12, 10)


def test_all_negatives_are_equally_likely() -> None:
    method, data = ready()
    torch.manual_seed(0)
    row = torch.searchsorted(method.index, data.index[:1])
    drawn = torch.cat([method.draw(row)[:, 1:] for _ in range(800)]).flatten()
    counts = drawn.bincount(minlength=12)[method.label != method.label[row]]
    # Five of eight in each of 800 draws: 500 times each, give or take 14.
    assert len(counts) == 8 and (counts - 500).abs().max() < 60


def test_a_batch_that_overflowed_leaves_no_trace_in_the_banks() -> None:
    method, data = ready()
    before = method.student_bank.clone()
    student, teacher = vectors(4, 4, 2), vectors(4, 6, 3)
    student.features["penultimate"][1] = math.nan
    rows = torch.searchsorted(method.index, data.index[:4])
    method.losses(student, {"teacher": teacher}, data.rows(slice(0, 4)), NOW)
    method.after_step(NOW)
    assert torch.equal(method.student_bank[rows[1]], before[rows[1]])
    assert not torch.equal(method.student_bank[rows[0]], before[rows[0]])
    step(method, data.rows(slice(4, 8)))
    assert (method.normalisers > 0).all() and method.student_bank.isfinite().all()


def test_the_normaliser_is_fixed_by_the_first_batch() -> None:
    method, data = ready()
    assert method.normalisers.tolist() == [0, 0]
    step(method, data.rows(slice(0, 4)))
    first = method.normalisers.clone()
    assert (first > 0).all()
    step(method, data.rows(slice(4, 8)), seed=5)
    assert torch.equal(method.normalisers, first)


def test_the_normaliser_is_that_of_the_batch_however_it_is_cut() -> None:
    found = []
    for cuts in ([0, 7], [0, 4, 7]):
        # All 8 samples of other classes are negatives: nothing depends on chance.
        method, data = ready(negatives=8)
        student, teacher = vectors(7, 4, 2), vectors(7, 6, 3)
        for first, last in itertools.pairwise(cuts):
            part = slice(first, last)
            method.losses(student.rows(part), {"teacher": teacher.rows(part)}, data.rows(part), NOW)
        method.after_step(NOW)
        found.append(method.normalisers)
    assert (found[0] > 0).all()
    torch.testing.assert_close(*found)


def test_bank_rows_move_by_momentum_and_have_unit_norm() -> None:
    method, data = ready(momentum=0.5)
    before = method.student_bank.clone()
    batch = data.rows(slice(0, 4))
    rows = torch.searchsorted(method.index, batch.index)
    step(method, batch)
    features = vectors(4, 4, 2).features["penultimate"]
    embedding = torch.nn.functional.normalize(method.student_embedding(features), dim=1)
    expected = torch.nn.functional.normalize(before[rows] / 2 + embedding / 2, dim=1)
    torch.testing.assert_close(method.student_bank[rows], expected)
    torch.testing.assert_close(method.teacher_bank[rows].norm(dim=1), torch.ones(4))
    untouched = [row for row in range(12) if row not in rows.tolist()]
    assert torch.equal(method.student_bank[untouched], before[untouched])


def test_scores_are_computed_before_the_bank_is_updated() -> None:
    method, data = ready()
    before = method.teacher_bank.clone()
    batch = data.rows(slice(0, 4))
    method.losses(vectors(4, 4, 2), {"teacher": vectors(4, 6, 3)}, batch, NOW)
    assert torch.equal(method.teacher_bank, before)


def test_banks_are_part_of_the_saved_state() -> None:
    method, data = ready()
    step(method, data.rows(slice(0, 4)))
    other, _ = ready()
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.teacher_bank, method.teacher_bank)
    assert torch.equal(other.normalisers, method.normalisers)


def test_mixed_targets_are_refused() -> None:
    data = Batch(torch.zeros(4, 1), torch.full((4, 3), 1 / 3), torch.arange(4))
    with pytest.raises(ValueError, match="mixup"):
        CRD().inspect([data])


def one_rank(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    method = CRD(dimension=8, negatives=5)
    method.setup(vectors(2, 4, 0), {"teacher": vectors(2, 6, 1)})
    index = torch.arange(12)
    data = Batch(torch.zeros(12, 1), index % 3, index)
    mine = slice(6 * rank, 6 * rank + 6)
    # Each rank sees its own half of the data, in the pass before training and in training.
    method.prepare({}, [data.rows(mine)])
    before = method.student_bank.clone()
    step(method, data.rows(slice(6 * rank, 6 * rank + 3 + rank)), seed=7 + rank)
    torch.save((method.state_dict(), before), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_banks_stay_equal_on_two_ranks(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    (first, before), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in ("index", "label", "student_bank", "teacher_bank", "normalisers"):
        assert torch.equal(first[name], second[name]), name
    moved = (first["student_bank"] != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [0, 1, 2, 6, 7, 8, 9]


def test_training_tells_the_matching_sample(data, teacher, student) -> None:
    method = CRD(negatives=256)
    history = train(method, student, teacher, data, epochs=3)
    assert history[-1]["contrast"] < 0.9 * history[0]["contrast"]
    assert agreement(student, teacher, data.inputs) > 0.8
    # The teacher's row of a sample is nearer to the student's than most others.
    similarity = method.student_bank @ method.teacher_bank.T
    nearer = (similarity < similarity.diagonal()[:, None]).float().mean()
    assert nearer > 0.8


def test_more_negatives_than_samples(data, teacher, student) -> None:
    assert start(CRD(), student, teacher, data).method.replacement
    assert not start(CRD(negatives=256), student, teacher, data).method.replacement
