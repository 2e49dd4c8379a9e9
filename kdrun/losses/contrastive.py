"""Telling the matching sample from others."""

from __future__ import annotations

from torch import Tensor

from kdrun.losses.precision import full_precision


@full_precision
def noise_contrastive_estimation(
    positive: Tensor, negative: Tensor, *, samples: int, epsilon: float = 1e-7
) -> Tensor:
    """Is a pair drawn from the data or from uniform noise?

    Gutmann and Hyvarinen 2010, as used by Tian et al., ICLR 2020, equation 18: with K draws of
    noise for each positive, and ``c = K / samples``,
    ``-log(x+ / (x+ + c + epsilon)) - sum_k log(c / (x-_k + c + epsilon))``, mean over rows.

    Args:
        positive: unnormalised probabilities x+ ``(B,)`` of the matching pairs.
        negative: x- ``(B, K)`` of the noise.
        samples: number of samples in the data set, among which noise is uniform.
        epsilon: keeps the ratios finite.
    """
    noise = negative.shape[1] / samples
    matching = (positive / (positive + noise + epsilon)).log()
    others = (noise / (negative + noise + epsilon)).log().sum(dim=1)
    return -(matching + others).mean()
