"""Sound as pictures: log-mel spectrograms of many clips at once, with torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = 1e-6
"""Added to the power before the logarithm: -60 dB below a full-scale tone, about."""


def log_mel(
    waves: Tensor, *, sample_rate: int, bands: int, frames: int, window: int, hop: int
) -> Tensor:
    """Log of the mel-band power of waveforms ``(N, samples)``: ``(N, bands, frames)``, in nats.

    Frames are centred at multiples of ``hop``, with reflection at the ends and a Hann window.

    Args:
        waves: in [-1, 1], at least ``(frames - 1) * hop`` samples; what comes later is cut.
        sample_rate: samples per second.
        bands: triangular filters of equal width on the mel scale, from 0 to half the rate.
        frames: columns of the result.
        window: samples of the Fourier transform.
        hop: samples from one frame to the next.
    """
    spectrum = torch.stft(
        waves[:, : (frames - 1) * hop + 1],
        window,
        hop,
        window=torch.hann_window(window, dtype=waves.dtype),
        return_complex=True,
    )
    power = spectrum.abs().square() / window
    filters = mel_filters(bands, window, sample_rate).to(waves.dtype)
    return (torch.einsum("mf,nft->nmt", filters, power) + FLOOR).log()


def mel_filters(bands: int, window: int, sample_rate: int) -> Tensor:
    """Triangular filters ``(bands, window // 2 + 1)`` with a peak of 1, on the mel scale of HTK.

    ``mel(f) = 2595 log10(1 + f / 700)``. A filter narrower than a bin of the transform takes the
    bin nearest to its peak.
    """
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, highest, bands + 2) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, window // 2 + 1)
    low, peak, high = (corners[i : i + bands, None] for i in range(3))
    filters = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp(min=0)
    nearest = torch.zeros_like(filters).scatter_(1, (bins - peak).abs().argmin(1, True), 1.0)
    return torch.where(filters.sum(1, keepdim=True) > 0, filters, nearest)


def add_noise(waves: Tensor, lengths: Tensor, snr_db: float, generator: torch.Generator) -> Tensor:
    """White noise on every clip, over all of its row.

    Args:
        waves: ``(N, samples)``, zero after the end of each clip.
        lengths: ``(N,)`` samples of each clip.
        snr_db: power of the clip, over its length, against that of the noise, in decibels.
        generator: of the noise.
    """
    power = waves.square().sum(1) / lengths
    deviation = (power / 10 ** (snr_db / 10)).sqrt()
    return waves + deviation[:, None] * torch.randn(waves.shape, generator=generator)
