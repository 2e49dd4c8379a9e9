from __future__ import annotations

import torch
from torchvision.transforms.v2 import functional

from kdrun.data.normalise import Normalisation


def test_equals_torchvision():
    images = torch.randint(
        0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]
    expected = functional.normalize(
        functional.to_dtype(images, torch.float32, scale=True), mean, std
    )
    assert torch.allclose(Normalisation(mean, std)(images), expected, atol=1e-6)


def test_vectors_in_their_own_units():
    x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    result = Normalisation([2.0, 20.0], [1.0, 5.0], value_range=1.0)(x)
    assert torch.equal(result, torch.tensor([[-1.0, -2.0], [1.0, 2.0]]))
    assert x[0, 0] == 1  # the stored values stay
