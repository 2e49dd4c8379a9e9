from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, multiprocessing

from kdrun.losses.distributed import gather
from kdrun.losses.optimal_transport import pairwise_l1, sinkhorn_plan


def transport_cost(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student, teacher = gather(student), gather(teacher)
    cost = pairwise_l1(student.softmax(1), teacher.softmax(1))
    return (sinkhorn_plan(cost, epsilon=0.1, iterations=20) * cost).sum() / len(student)


ROWS = ((0, 4), (4, 7))
"""First and last + 1 row of each rank: a batch that two ranks cannot share evenly."""


def clouds() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0)).unbind()


def one_rank(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    first, last = ROWS[rank]
    student, teacher = (cloud[first:last] for cloud in clouds())
    # A weight shared by both ranks, whose gradients data-parallel training averages by rows.
    weight = torch.ones(4, requires_grad=True)
    loss = transport_cost(student * weight, teacher)
    (loss * (last - first) / 7).backward()
    distributed.all_reduce(weight.grad)
    torch.save((loss.detach(), weight.grad), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_without_a_process_group_nothing_is_gathered() -> None:
    tensor = torch.ones(2, 3)
    assert gather(tensor) is tensor


def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    student, teacher = clouds()
    weight = torch.ones(4, requires_grad=True)
    loss = transport_cost(student * weight, teacher)
    loss.backward()
    for rank in (0, 1):
        their_loss, their_gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(their_loss, loss.detach())
        torch.testing.assert_close(their_gradient, weight.grad)
