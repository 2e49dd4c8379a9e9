"""Looking across ranks: batch-wise losses on the batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def gather(tensor: Tensor) -> Tensor:
    """The rows of every rank, in the order of ranks; ``tensor`` itself without a process group.

    Gradients reach the local rows only. They are multiplied by the number of ranks, because
    data-parallel training averages gradients over ranks: a loss that every rank computes on the
    gathered rows then trains exactly as one process does on the whole batch.

    Args:
        tensor: ``(B, ...)``; every rank must hold the same shape.

    Returns:
        ``(ranks * B, ...)``.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        rows = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(rows, tensor.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        ranks = distributed.get_world_size()
        return gradient.chunk(ranks)[distributed.get_rank()] * ranks
