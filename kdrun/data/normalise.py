"""From stored values to what networks read: subtract the mean, divide by the standard deviation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalisation:
    """Per-channel affine map ``(x / value_range - mean) / std``, evaluated in float32.

    Args:
        mean: one number per channel, in units where ``value_range`` is 1.
        std: one positive number per channel, same units.
        value_range: the stored value that counts as 1; 255 for 8-bit images.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, value_range: float = 255.0
    ) -> None:
        self.mean, self.std, self.value_range = tuple(mean), tuple(std), value_range
        self._by_device: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x`` of shape ``(B, C, ...)``; the result is new memory, float32."""
        key = (x.device, x.ndim)
        if key not in self._by_device:
            shape = (-1, *[1] * (x.ndim - 2))
            mean = torch.tensor(self.mean, dtype=torch.float64) * self.value_range
            inverse = 1 / (torch.tensor(self.std, dtype=torch.float64) * self.value_range)
            self._by_device[key] = (
                mean.float().view(shape).to(x.device),
                inverse.float().view(shape).to(x.device),
            )
        mean, inverse = self._by_device[key]
        return x.to(torch.float32, copy=True).sub_(mean).mul_(inverse)

    def __repr__(self) -> str:
        return f"Normalisation({self.mean}, {self.std}, value_range={self.value_range})"
