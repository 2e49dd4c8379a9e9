from __future__ import annotations

import pytest
import torch

from kdrun.data.augment import Augmentation, Mix
from kdrun.data.batches import Preprocessing
from kdrun.data.loader import AugmentationCycle, LoaderOptions
from kdrun.data.normalise import Normalisation
from kdrun.data.resident import Samples
from kdrun.errors import UserError
from kdrun.outputs import Batch

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]
AUGMENTATION = Augmentation(crop_padding=2, flip=0.5)
STRONG = Augmentation(crop_padding=2, flip=0.5, policy="fixmatch", cutout=6)


def loader(samples, *, mix=None, **options):
    preprocessing = Preprocessing(
        Normalisation(MEAN, STD), AUGMENTATION, {"strong": STRONG}, mix, num_classes=5
    )
    defaults = {"batch_size": 8, "shuffle": True, "augment": True, "views": ("strong",)}
    return samples.serve(LoaderOptions(**defaults | options), preprocessing)


def epoch(loader, number: int, start: int = 0) -> list[Batch]:
    loader.set_epoch(number, start)
    return list(loader)


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.views["strong"], second.views["strong"])
    assert torch.equal(first.target, second.target)
    assert torch.equal(first.index, second.index)


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([batch.inputs for batch in batches]),
        torch.cat([batch.target for batch in batches]),
        torch.cat([batch.index for batch in batches]),
        views={"strong": torch.cat([batch.views["strong"] for batch in batches])},
    )


def test_an_epoch_holds_every_sample_once(samples):
    batches = epoch(loader(samples), 0)
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    everything = joined(batches)
    assert torch.equal(everything.index.sort().values, samples.index)
    assert torch.equal(everything.target, (everything.index - 100) % 5)


def test_drop_last(samples):
    kept = loader(samples, drop_last=True)
    assert len(kept) == 6
    assert [len(batch) for batch in kept] == [8] * 6


def test_epochs_and_seeds_differ(samples):
    first, second = epoch(loader(samples), 0)[0], epoch(loader(samples), 1)[0]
    assert not torch.equal(first.index, second.index)
    assert not torch.equal(first.index, epoch(loader(samples, seed=1), 0)[0].index)


def test_nothing_but_seed_and_epoch_decides(samples):
    fresh = epoch(loader(samples), 3)
    used = loader(samples)
    epoch(used, 0)
    torch.rand(5)
    for first, second in zip(fresh, epoch(used, 3), strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("mix", [None, Mix(mixup=1.0, cutmix=1.0)])
def test_resume_and_replay_are_exact(samples, mix):
    whole = epoch(loader(samples, mix=mix), 2)
    for first, second in zip(whole[4:], epoch(loader(samples, mix=mix), 2, start=4), strict=True):
        assert_same(first, second)
    elsewhere = loader(samples, mix=mix)
    epoch(elsewhere, 5)
    assert_same(whole[6], elsewhere.replay(2, 6))
    with pytest.raises(IndexError, match="batch 7 of 7"):
        elsewhere.replay(2, 7)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("mix", [None, Mix(mixup=1.0, cutmix=1.0)])
def test_ranks_share_the_batches_of_one_process(samples, world_size, mix):
    alone = epoch(loader(samples, mix=mix), 1)
    ranks = [
        epoch(loader(samples, mix=mix, rank=rank, world_size=world_size), 1)
        for rank in range(world_size)
    ]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert_same(whole, joined(list(parts)))


def test_how_a_sample_is_augmented_does_not_depend_on_the_batch_size(samples):
    small, large = (
        joined(epoch(loader(samples), 1)),
        joined(epoch(loader(samples, batch_size=25), 1)),
    )
    assert_same(small, large)


def test_a_cycle_repeats_augmentations_in_other_orders(samples):
    """Epoch e shows every sample as epoch e mod length of a loader with the cycle's seed."""
    cycling = loader(samples, seed=1, cycle=AugmentationCycle(seed=7, length=2))
    plain = loader(samples, seed=7, shuffle=False)
    for number in range(5):
        seen = joined(epoch(cycling, number))
        assert {batch.augmentation for batch in epoch(cycling, number)} == {number % 2}
        assert torch.equal(seen.index, joined(epoch(loader(samples, seed=1), number)).index)
        expected = joined(epoch(plain, number % 2))
        rows = seen.index - 100
        assert torch.equal(seen.inputs, expected.inputs[rows])
        assert torch.equal(seen.views["strong"], expected.views["strong"][rows])


def test_a_batch_carries_the_number_of_its_augmentation(samples):
    for options in ({}, {"augment": False, "views": ()}, {"mix": Mix(mixup=1.0)}):
        batches = epoch(loader(samples, **options), 3)
        assert {batch.augmentation for batch in batches} == {3}
        assert batches[0].rows(slice(2)).augmentation == 3


def test_a_view_does_not_depend_on_which_views_are_asked_for(samples):
    both, one = epoch(loader(samples), 0)[0], epoch(loader(samples, views=()), 0)[0]
    assert torch.equal(both.inputs, one.inputs)
    assert one.views == {}


def test_without_augmentation_inputs_are_normalised_only(samples):
    expected = (samples.inputs / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    plain = epoch(loader(samples, augment=False, shuffle=False, views=()), 0)
    assert torch.allclose(torch.cat([batch.inputs for batch in plain]), expected, atol=1e-5)


def test_normalising_once_or_by_batch_is_the_same(samples, monkeypatch):
    once = epoch(loader(samples, augment=False), 0)[0]
    monkeypatch.setattr("kdrun.data.resident.NORMALISE_ONCE_BYTES", 0)
    by_batch = epoch(loader(samples, augment=False), 0)[0]
    assert_same(once, by_batch)


def test_the_border_is_black_before_normalisation(samples):
    white = Samples(torch.full_like(samples.inputs, 255), samples.target, samples.index)
    seen = torch.cat([batch.inputs for batch in loader(white)])
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    assert torch.allclose(seen.amin((0, 2, 3)), black, atol=1e-6)


@pytest.mark.parametrize("augment", [True, False])
def test_type_and_memory_format(samples, augment):
    options = {"dtype": torch.bfloat16, "channels_last": True, "augment": augment, "views": ()}
    batch = epoch(loader(samples, **options), 0)[0]
    assert batch.inputs.dtype == torch.bfloat16
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    plain = epoch(loader(samples, augment=augment, views=()), 0)[0]
    assert torch.equal(batch.inputs, plain.inputs.bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mix", [None, Mix(mixup=1.0, cutmix=1.0)])
def test_batches_are_identical_on_the_gpu(samples, mix):
    for first, second in zip(
        epoch(loader(samples, mix=mix), 1),
        epoch(loader(samples, mix=mix, device="cuda"), 1),
        strict=True,
    ):
        assert second.inputs.is_cuda
        moved = Batch(
            second.inputs.cpu(),
            second.target.cpu(),
            second.index.cpu(),
            views={"strong": second.views["strong"].cpu()},
        )
        assert_same(first, moved)


def test_samples_that_do_not_fit_on_the_device(samples, monkeypatch):
    def full(values, *words, **named):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(UserError, match="50 samples do not fit into the memory of cpu"):
        loader(samples)


def test_taking_all_rows_copies_nothing(samples):
    assert samples.take(torch.arange(50)) is samples
    some = samples.take(torch.tensor([3, 4]))
    assert some.index.tolist() == [103, 104] and some.content == samples.content


def test_several_inputs_travel_together() -> None:
    inputs = {"image": torch.rand(10, 1, 4, 4), "tokens": torch.arange(30).reshape(10, 3)}
    samples = Samples(dict(inputs), torch.arange(10) % 2, torch.arange(10))
    part = samples.take(torch.arange(1, 10))
    assert part.shape == {"image": (1, 4, 4), "tokens": (3,)}
    loader = part.serve(
        LoaderOptions(batch_size=4, seed=1, shuffle=True, augment=True, dtype=torch.float64),
        Preprocessing(),
    )
    batches = list(loader)
    assert sorted(int(i) for batch in batches for i in batch.index) == list(range(1, 10))
    for batch in batches:
        assert torch.equal(batch.inputs["tokens"], inputs["tokens"][batch.index])
        assert torch.equal(batch.inputs["image"], inputs["image"][batch.index].double())
        assert batch.inputs["tokens"].dtype == torch.int64
    assert Samples(dict(inputs), samples.target, samples.index).content == samples.content
    renamed = {"picture": inputs["image"], "tokens": inputs["tokens"]}
    assert Samples(renamed, samples.target, samples.index).content != samples.content


def test_several_inputs_are_not_augmented() -> None:
    samples = Samples({"image": torch.rand(4, 1, 4, 4)}, torch.zeros(4).long(), torch.arange(4))
    flipped = Preprocessing(augmentation=Augmentation(flip=0.5))
    with pytest.raises(ValueError, match="neither normalised nor augmented"):
        samples.serve(LoaderOptions(batch_size=2, augment=True), flipped)
