"""Looking across ranks: batch-wise losses on the batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def gather(tensor: Tensor, weight: Tensor | None = None) -> Tensor:
    """The rows of every rank, in the order of ranks; ``tensor`` itself without a process group.

    Gradients reach the local rows only, multiplied by the weight of all ranks over this one's.
    Training averages the gradients of ranks by their weights; so a loss that every rank computes on
    the gathered rows trains exactly as one process does on the whole batch.

    Args:
        tensor: ``(B, ...)``; ranks may hold different numbers of rows.
        weight: of this rank in training, a scalar: the positions of its batch that count, where
            there is a mask. None: its rows.

    Returns:
        ``(sum of B over ranks, ...)``.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    return _Gather.apply(tensor, weight)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, weight: Tensor | None) -> Tensor:
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        counts = torch.zeros(ranks, dtype=torch.int64, device=tensor.device)
        counts[rank] = len(tensor)
        distributed.all_reduce(counts)
        counts = counts.tolist()
        # A collective wants equal shapes: short ranks are filled up, and cut back after it.
        local = tensor.new_zeros(max(counts), *tensor.shape[1:])
        local[: len(tensor)] = tensor
        padded = [torch.empty_like(local) for _ in range(ranks)]
        distributed.all_gather(padded, local)
        context.first, context.rows = sum(counts[:rank]), counts[rank]
        context.factor = sum(counts) / counts[rank]
        if weight is not None:
            context.factor = sum_over_ranks(weight) / weight.clamp(min=1)
        return torch.cat([rows[:count] for rows, count in zip(padded, counts, strict=True)])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        local = gradient[context.first : context.first + context.rows]
        return local * context.factor, None


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """Mean of a scalar over ranks, without gradient; the value itself without a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over ranks, without gradient; the values themselves without a group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total
