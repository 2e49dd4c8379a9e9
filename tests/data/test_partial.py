"""Few labels: who has one, how batches are paired, captions, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrun.build import instantiate
from kdrun.data.augment import Mix
from kdrun.data.captions import Captions
from kdrun.data.loader import LoaderOptions
from kdrun.data.paired import PairedLoader
from kdrun.data.partial import PartlyLabelled
from kdrun.errors import UserError
from tests.tiny import composed


def prepared(seed: int = 0, **changes: Any) -> PartlyLabelled:
    data = instantiate(composed("dataset=digits_few_shot").values["dataset"] | changes)
    data.prepare()
    data.draw_labels(seed)
    return data


def loader(data: PartlyLabelled, batch_size: int = 64, **options: Any) -> PairedLoader:
    loader = data.train(batch_size=batch_size, seed=0, device="cpu", unlabelled=True, **options)
    assert isinstance(loader, PairedLoader)
    return loader


def epoch(loader: PairedLoader, number: int = 0, start: int = 0) -> list:
    loader.set_epoch(number, start)
    return list(loader)


def test_every_sample_has_one_place() -> None:
    data = prepared(shots=2)
    labelled, pool = data.labelled, data.unlabelled
    assert torch.equal(torch.bincount(labelled.target), torch.full((10,), 2))
    assert not torch.isin(labelled.index, pool.index).any()
    assert len(labelled) + len(pool) == data.train_size == 597
    assert (data.labelled_size, data.validation_size, data.test_size) == (20, 200, 500)
    assert data.for_teacher.train_size == 500
    held = data.for_teacher.loader("train", LoaderOptions(batch_size=500)).replay(0, 0).index
    assert not torch.isin(held, torch.cat([labelled.index, pool.index])).any()


def test_labels_of_the_pool_are_hidden() -> None:
    data = prepared()
    assert (data.unlabelled.target == -1).all()
    batch = next(iter(loader(data)))
    assert (batch.unlabelled.target == -1).all() and (batch.target >= 0).all()


def test_the_seed_of_the_run_chooses_unless_there_is_another() -> None:
    first, second = prepared(0), prepared(1)
    assert not torch.equal(first.labelled.index, second.labelled.index)
    assert first.fingerprint != second.fingerprint
    assert first.for_teacher.fingerprint == second.for_teacher.fingerprint
    fixed = [prepared(seed, label_seed=13).labelled.index for seed in (0, 1)]
    assert torch.equal(*fixed)


def test_labels_that_are_not_there_cannot_be_mixed() -> None:
    data = prepared()
    data.preprocessing = replace(data.preprocessing, mix=Mix(mixup=1.0))
    assert next(iter(data.train(batch_size=8, seed=0, device="cpu"))).target.shape == (8, 10)
    with pytest.raises(UserError, match="mix.target=soft mixes labels, which the unlabelled"):
        loader(data)
    data.preprocessing = replace(data.preprocessing, mix=Mix(mixup=1.0, target="first"))
    batch = next(iter(loader(data)))
    assert (batch.target >= 0).all() and (batch.unlabelled.target == -1).all()


def test_percent_keeps_the_classes_in_proportion() -> None:
    data = prepared(shots=None, percent=10.0)
    counts = torch.bincount(data.labelled.target)
    assert counts.sum() == 60 and counts.min() >= 5 and counts.max() <= 7


def test_bought_labels_move_samples() -> None:
    data = prepared()
    bought = data.unlabelled.index[:7]
    more = data.with_labels(torch.cat([data.labelled.index, bought]))
    assert len(more.labelled) == 17 and len(more.unlabelled) == len(data.unlabelled) - 7
    assert torch.isin(bought, more.labelled.index).all()
    assert (more.labelled.target >= 0).all() and len(data.labelled) == 10
    assert more.fingerprint != data.fingerprint
    everything = torch.cat([more.labelled.index, more.unlabelled.index]).sort().values
    before = torch.cat([data.labelled.index, data.unlabelled.index]).sort().values
    assert torch.equal(everything, before)


def test_a_limited_pool_is_drawn_once() -> None:
    data = prepared(unlabelled_limit=50)
    assert len(data.unlabelled) == 50
    more = data.with_labels(torch.cat([data.labelled.index, data.unlabelled.index[:5]]))
    assert torch.equal(more.unlabelled.index, data.unlabelled.index[5:])


@pytest.mark.parametrize(
    ("pairs", "batch_size", "steps"),
    [
        ("zip", 4, 3),  # 10 labelled images
        ("cycle_labelled", 64, 10),  # 587 others
        ("cycle_unlabelled", 4, 3),
        ("with_replacement", 4, 3),
    ],
)
def test_how_long_an_epoch_is(pairs: str, batch_size: int, steps: int) -> None:
    data = prepared(pairs=pairs, steps=None)
    batches = loader(data, batch_size)
    assert len(batches) == data.batches(batch_size) == steps == len(epoch(batches))
    sizes = [data.samples_at(position, batch_size) for position in range(steps)]
    assert [len(batch) for batch in epoch(batches)] == sizes


def numbers(batches: list) -> list[tuple[list[int], list[int]]]:
    return [(b.index.tolist(), b.unlabelled.index.tolist()) for b in batches]


@pytest.mark.parametrize("pairs", ["zip", "cycle_labelled", "cycle_unlabelled", "with_replacement"])
def test_any_batch_can_be_made_again(pairs: str) -> None:
    data = prepared(pairs=pairs, steps=None)
    batches = loader(data, 4)
    for number in (0, 2):
        whole = epoch(batches, number)
        assert numbers(epoch(batches, number, 1)) == numbers(whole)[1:]
        again = [batches.replay(number, position) for position in range(len(batches))]
        assert numbers(again) == numbers(whole)
        for one, other in zip(again, whole, strict=True):
            assert torch.equal(one.unlabelled.inputs, other.unlabelled.inputs)
    with pytest.raises(IndexError):
        batches.replay(0, len(batches))


def test_a_labelled_set_that_is_through_starts_over() -> None:
    data = prepared(pairs="cycle_labelled", steps=None)
    batches = epoch(loader(data, 5), 0)
    seen = torch.cat([batch.index for batch in batches])
    for first in range(0, 100, 10):
        assert seen[first : first + 10].sort().values.tolist() == data.labelled.index.tolist()
    assert seen[:10].tolist() != seen[10:20].tolist()
    pool = torch.cat([batch.unlabelled.index for batch in batches])
    assert torch.equal(pool.sort().values, data.unlabelled.index)


def test_a_pool_that_is_not_through_goes_on_in_the_next_epoch() -> None:
    data = prepared(pairs="with_replacement", steps=2)
    batches = loader(data, 64)
    pool = [b.unlabelled.index for number in range(5) for b in epoch(batches, number)]
    assert torch.equal(torch.cat(pool).sort().values, data.unlabelled.index)


def test_batches_drawn_with_replacement_are_full() -> None:
    data = prepared(pairs="with_replacement", steps=3)
    drawn = [batch.index for batch in epoch(loader(data, 64))]
    assert [len(index) for index in drawn] == [64] * 3
    assert set(torch.cat(drawn).tolist()) == set(data.labelled.index.tolist())


def test_a_sample_drawn_twice_is_augmented_in_two_ways() -> None:
    node = composed("dataset=digits_few_shot").values["dataset"]
    inner = node["data"] | {"augmentation": node["data"]["augmentation"] | {"crop_padding": 2}}
    data = prepared(data=inner, steps=1)
    batch = loader(data, 64).replay(0, 0)
    same = batch.inputs[batch.index == batch.index[0]]
    assert len(same) > 1 and not torch.equal(same[0], same[1])


def test_without_the_unlabelled_batches_are_the_same() -> None:
    data = prepared()
    alone = data.train(batch_size=64, seed=0, device="cpu")
    for one, other in zip(alone, loader(data), strict=True):
        assert one.unlabelled is None and torch.equal(one.inputs, other.inputs)


def test_ranks_share_every_batch() -> None:
    data = prepared(pairs="zip", steps=None, shots=4)
    whole = loader(data, 8).replay(0, 1)
    parts = [loader(data, 8, rank=rank, world_size=2).replay(0, 1) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
    pool = torch.cat([part.unlabelled.index for part in parts])
    assert torch.equal(pool, whole.unlabelled.index)


def test_prompts() -> None:
    data = prepared(templates=["a photo of the digit {}.", "a {}."])
    assert data.prompts[3] == ["a photo of the digit three.", "a three."]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shots": 500}, r"dataset.shots=500: class \d has \d+ samples, not 500"),
        ({"names": ["zero"] * 9}, "9 names for 10 classes, which leaves some class without a pro"),
        ({"names": ["zero"] * 9 + [" "]}, "class 9 has no name, so it has no prompt"),
    ],
)
def test_what_is_refused_when_the_data_are_prepared(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepared(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"percent": 1.0}, "give one of shots and percent"),
        ({"pairs": "zip"}, "steps has a meaning only with pairs=with_replacement"),
        ({"templates": ["a digit"]}, "templates must be sentences"),
    ],
)
def test_what_is_refused_before(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        instantiate(composed("dataset=digits_few_shot").values["dataset"] | changes)


# -- captions --------------------------------------------------------------------------------------


def named(target: Tensor, **options: Any) -> Tensor:
    return Captions(**options).classes(target, 10)


def test_captions_are_wrong_as_often_as_they_are_asked_to_be() -> None:
    target = torch.arange(10).repeat(2000)
    assert torch.equal(named(target, random=0.0, confused=0.0), target)
    confused = named(target, random=0.0, confused=0.4, look_alikes=[[3, 8]])
    assert (confused != target).sum() == (confused[target == 3] == 8).sum()
    assert (confused[target == 3] == 8).float().mean() == pytest.approx(0.4, abs=0.04)
    random = named(target, random=0.2, confused=0.0)
    assert (random != target).float().mean() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(random, named(target, random=0.2, confused=0.0))


def test_captions_of_classes_that_are_not_there() -> None:
    with pytest.raises(UserError, match="there are 10 classes"):
        prepared(captions=Captions(look_alikes=[[3, 12]]))
    with pytest.raises(UserError, match="some must be left"):
        prepared(captions=Captions(count=5000))
