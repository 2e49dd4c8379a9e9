"""Images per second of the resident loader and of per-image transforms.

Padded random crop, flip and normalisation of 32x32 images: on whole batches, and in the common way,
an array, PIL and torchvision's transforms per image, batches stacked in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.common import BATCH, CLASSES, spread


def bench_data(rounds: int, images: int = 3200) -> None:
    """Images per second on one thread, resident over per-image transforms."""
    from PIL import Image
    from torchvision import transforms

    from kdrun.data.augment import Augmentation
    from kdrun.data.batches import Preprocessing
    from kdrun.data.loader import LoaderOptions
    from kdrun.data.normalise import Normalisation
    from kdrun.data.resident import Samples

    torch.set_num_threads(1)
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    target = torch.randint(CLASSES, (images,), generator=generator)
    array = pixels.permute(0, 2, 3, 1).numpy()
    change = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

    def per_image() -> None:
        for first in range(0, images, BATCH):
            torch.stack([change(Image.fromarray(item)) for item in array[first : first + BATCH]])

    preprocessing = Preprocessing(
        normalisation=Normalisation(mean, std),
        augmentation=Augmentation(crop_padding=4, flip=0.5),
        num_classes=CLASSES,
    )
    options = LoaderOptions(batch_size=BATCH, shuffle=True, augment=True)
    loader = Samples(pixels, target, torch.arange(images)).serve(options, preprocessing)

    def resident() -> None:
        for _ in loader:
            pass

    def speed(run: Callable[[], None]) -> float:
        began = time.process_time()
        run()
        return images / (time.process_time() - began)

    rows = []
    for number in range(rounds + 1):
        loader.set_epoch(number)
        if number % 2:
            fast, slow = speed(resident), speed(per_image)
        else:
            slow, fast = speed(per_image), speed(resident)
        rows.append((fast, slow))
    rows = rows[1:]
    print(f"resident  {spread([fast for fast, _ in rows])} images/s")
    print(f"per image {spread([slow for _, slow in rows])} images/s")
    print(f"ratio     {spread([fast / slow for fast, slow in rows])} ({rounds} rounds)")
