"""Turns: who goes next, whose random numbers are drawn, who waits for whom."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from kdrun.lockstep import Lockstep, Member


def test_members_keep_step() -> None:
    seen: list[tuple[str, int, int]] = []

    def work(member: Member) -> str:
        member.enter_stage(0)
        for epoch in range(2):
            for position in range(3):
                member.stand_aside(epoch, position)
                seen.append((member.label, epoch, position))
        return member.label

    ended = Lockstep(["a", "b", "c"]).run(work)
    assert [end.result for end in ended] == ["a", "b", "c"]
    assert seen == [(label, e, p) for e in range(2) for p in range(3) for label in "abc"]


def test_whoever_is_behind_catches_up_first() -> None:
    seen: list[tuple[str, int]] = []

    def work(member: Member) -> None:
        member.enter_stage(1 if member.label == "ahead" else 0)
        first = 3 if member.label == "middle" else 0
        for position in range(first, 5):
            member.stand_aside(0, position)
            seen.append((member.label, position))
        member.enter_stage(1)
        member.stand_aside(0, 0)
        seen.append((member.label, 10))

    Lockstep(["ahead", "middle", "behind"]).run(work)
    assert seen[:5] == [*(("behind", p) for p in range(3)), ("middle", 3), ("behind", 3)]
    assert ("ahead", 0) in seen and seen.index(("ahead", 0)) > seen.index(("behind", 4))


def test_each_draws_its_own_random_numbers() -> None:
    def draws(seed: int, pause) -> list[float]:
        torch.manual_seed(seed)
        random.seed(seed)
        found = []
        for position in range(4):
            pause(position)
            found += [torch.rand(()).item(), random.random()]
        return found

    def work(member: Member) -> list[float]:
        return draws(int(member.label), lambda position: member.stand_aside(0, position))

    ended = Lockstep(["1", "2", "3"]).run(work)
    for seed, end in enumerate(ended, start=1):
        assert end.result == draws(seed, lambda position: None)


def test_gradient_mode_and_autocast_are_ones_own() -> None:
    def work(member: Member) -> tuple[bool, bool]:
        with torch.set_grad_enabled(member.label == "a"), torch.autocast("cpu", enabled=True):
            member.stand_aside(0, 0)
            return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def plain(member: Member) -> tuple[bool, bool]:
        member.stand_aside(0, 0)
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    works = {"a": work, "b": work, "c": plain}
    ended = Lockstep(list(works)).run(lambda member: works[member.label](member))
    assert [end.result for end in ended] == [(True, True), (False, True), (True, False)]


def test_an_error_ends_one_member_only() -> None:
    def work(member: Member) -> str:
        member.stand_aside(0, 0)
        if member.label == "b":
            raise SystemExit(3)
        member.stand_aside(0, 1)
        return "done"

    first, second, third = Lockstep(["a", "b", "c"]).run(work)
    assert (first.result, third.result) == ("done", "done")
    assert isinstance(second.error, SystemExit)


def test_a_lock_that_another_member_holds_is_waited_for() -> None:
    """Both need a product of stage 0; the second finds it before the first goes on to stage 1."""
    lock, seen = threading.Lock(), []

    def work(member: Member) -> None:
        member.enter_stage(0)
        while not lock.acquire(blocking=False):
            seen.append(f"{member.label} waits")
            member.wait_for_lock()
        for position in range(3):
            member.stand_aside(0, position)
        seen.append(f"{member.label} made it")
        lock.release()
        member.enter_stage(1)
        member.stand_aside(0, 0)
        seen.append(f"{member.label} goes on")

    Lockstep(["a", "b"]).run(work)
    assert seen == ["b waits", "a made it", "b made it", "a goes on", "b goes on"]


def test_a_lock_of_another_process_holds_up_only_the_one_that_wants_it() -> None:
    looks, seen = [], []

    def work(member: Member) -> None:
        if member.label == "a":
            while len(looks) < 3:
                looks.append(len(seen))
                member.wait_for_lock()
            return
        member.enter_stage(0)
        for position in range(5):
            member.stand_aside(0, position)
            seen.append(position)

    Lockstep(["a", "b"]).run(work)
    assert seen == list(range(5))
    # It looks at first, when the other has entered a stage, and when it has ended.
    assert looks == [0, 0, 5]


def test_what_one_has_made_serves_all() -> None:
    made: list[str] = []

    def work(member: Member) -> list[str]:
        member.stand_aside(0, 0)
        return member.share("key", lambda: made + [member.label])

    ended = Lockstep(["a", "b"]).run(work)
    assert ended[0].result is ended[1].result
    assert ended[0].result == ["a"]


@pytest.mark.parametrize("count", [1, 20])
def test_any_number_of_members(count: int) -> None:
    ended = Lockstep([str(number) for number in range(count)]).run(lambda member: member.companions)
    assert [end.result for end in ended] == [count] * count
