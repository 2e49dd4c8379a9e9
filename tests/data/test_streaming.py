from __future__ import annotations

import io
import multiprocessing
import signal
import subprocess
import sys
import zlib

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from kdrun.data import streaming
from kdrun.data.augment import Augmentation, Mix
from kdrun.data.images import Images
from kdrun.data.loader import AugmentationCycle
from kdrun.data.seeding import stream_seed
from kdrun.data.streaming import CROP

PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def folder_set(root, workers=0, mix=None) -> Images:
    strong = Augmentation(flip=0.5, policy="fixmatch", cutout=6)
    module = Images(
        name=str(root),
        storage="stream",
        image_size=12,
        resize=16,
        crop_scale=[0.08, 1.0],
        augmentation=Augmentation(flip=0.5),
        views={"strong": strong},
        mix=mix,
        workers=workers,
        **PLAIN,
    )
    module.prepare("paper")
    return module


def train(module, **options):
    return module.train(batch_size=5, seed=2, device="cpu", views=("strong",), **options)


def epoch(loader, number, start=0):
    loader.set_epoch(number, start)
    return list(loader)


def assert_same(first, second):
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.views["strong"], second.views["strong"])
    assert torch.equal(first.target, second.target)
    assert torch.equal(first.index, second.index)


def test_training_crops_are_torchvisions(class_folders):
    loader = folder_set(class_folders).train(batch_size=24, seed=2, device="cpu", shuffle=False)
    loader.set_epoch(4)
    (batch,) = loader
    files = sorted((class_folders / "train").rglob("*.png"))
    reference = v2.Compose([v2.RandomResizedCrop(12, scale=(0.08, 1.0)), v2.PILToTensor()])
    flipped = 0
    for image, index in zip(batch.inputs, batch.index.tolist(), strict=True):
        torch.manual_seed(stream_seed(2, 4, CROP, zlib.crc32(b"inputs"), index))
        expected = reference(Image.open(files[index])).float()
        mirrored = not torch.allclose(image, expected, atol=1e-3)
        flipped += mirrored
        assert torch.allclose(image.flip(2) if mirrored else image, expected, atol=1e-3)
    assert 4 < flipped < 20


def test_evaluation_transform_is_torchvisions(class_folders):
    (batch,) = folder_set(class_folders).test(batch_size=100, device="cpu")
    reference = v2.Compose([v2.Resize(16), v2.CenterCrop(12), v2.PILToTensor()])
    files = sorted((class_folders / "test").rglob("*.png"))
    expected = torch.stack([reference(Image.open(file)).float() for file in files])
    assert torch.allclose(batch.inputs, expected, atol=1e-3)
    assert batch.target.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_neither_workers_nor_resuming_change_a_batch(class_folders):
    alone = epoch(train(folder_set(class_folders)), 1)
    assert [len(batch) for batch in alone] == [5, 5, 5, 5, 4]
    with_workers = train(folder_set(class_folders, workers=2))
    epoch(with_workers, 0)  # the same processes go on to the next epoch
    for first, second in zip(alone, epoch(with_workers, 1), strict=True):
        assert_same(first, second)
    for first, second in zip(alone[3:], epoch(with_workers, 1, start=3), strict=True):
        assert_same(first, second)
    assert_same(alone[2], with_workers.replay(1, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who has sent a signal")
def test_workers_outlive_a_signal_to_the_whole_job(class_folders):
    before = multiprocessing.active_children()
    loader = train(folder_set(class_folders, workers=1))
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    script = f"import os; os.kill({worker.pid}, {signal.SIGTERM})"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert len(list(batches)) == len(loader) - 1
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_the_global_generator_is_left_alone(class_folders):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(train(folder_set(class_folders)), 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mix", [None, Mix(mixup=1.0, cutmix=1.0)])
def test_ranks_share_the_batches_of_one_process(class_folders, mix):
    module = folder_set(class_folders, mix=mix)
    alone = epoch(train(module), 0)
    ranks = [epoch(train(module, rank=rank, world_size=2), 0) for rank in range(2)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.inputs, torch.cat([first.inputs, second.inputs]))
        assert torch.equal(whole.target, torch.cat([first.target, second.target]))


def test_grey_palette_and_transparent_files_become_colour(class_folders):
    for number, mode in enumerate(("L", "P", "RGBA", "CMYK")):
        buffer = io.BytesIO()
        form = "TIFF" if mode == "CMYK" else "PNG"
        Image.new(mode, (20, 20), 3).save(buffer, form)
        (class_folders / "test" / "cat" / f"{number}.png").write_bytes(buffer.getvalue())
    (batch,) = folder_set(class_folders).test(batch_size=100, device="cpu")
    assert batch.inputs.shape == (12, 3, 12, 12)


def test_a_cycle_repeats_augmentations(class_folders):
    module = folder_set(class_folders)
    cycling = module.train(
        batch_size=24,
        seed=3,
        device="cpu",
        views=("strong",),
        cycle=AugmentationCycle(seed=2, length=2),
    )
    plain = module.train(batch_size=24, seed=2, device="cpu", views=("strong",), shuffle=False)
    (seen,), (expected,) = epoch(cycling, 5), epoch(plain, 1)
    order = expected.index.argsort()[seen.index.argsort().argsort()]
    assert seen.augmentation == 1
    assert torch.equal(seen.index, expected.index[order])
    assert torch.equal(seen.inputs, expected.inputs[order])
    assert torch.equal(seen.views["strong"], expected.views["strong"][order])


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(12, None, 12), (12, "4", 3), (2, "4", 1), (64, None, 16)]
)
def test_the_processes_of_a_machine_share_its_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(streaming, "usable_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert streaming.default_workers() == workers
