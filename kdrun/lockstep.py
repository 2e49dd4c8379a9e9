"""Runs side by side: each in a thread of its own, of which one works at a time.

Every run is the ordinary code of a single run, stage by stage. It stands aside only before it takes
a batch, until all others have come as far, so that one batch and one forward of a teacher serve
them all. Threads are the stacks that this needs, not parallelism: torch keeps gradient mode and
autocast per thread, and the states of the random generators, of which the process has one set,
change hands with the turn.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kdrun.training_state import generator_states, restore_generators

T = TypeVar("T")
Made = TypeVar("Made")

Place = tuple[int, int, int]
"""How far a run has come: number of the stage, epoch, batch in the epoch."""
START: Place = (-1, 0, 0)
LOOK_SECONDS = 1.0
"""Between two looks of the main thread, which waits for the others and receives the signals."""


@dataclass(frozen=True)
class Ended(Generic[T]):
    """How a run ended: with a result, or with an error."""

    result: T | None = None
    error: BaseException | None = None


class Member:
    """One of several runs side by side, as its stages see it.

    Attributes:
        label: what tells it from the others, for messages.
        companions: number of all runs, itself among them.
    """

    def __init__(self, lockstep: Lockstep, label: str) -> None:
        self.label = label
        self.companions = lockstep.size
        self._lockstep = lockstep
        self._turn = threading.Semaphore(0)
        self.place = START
        self.locked_out_at: int | None = None
        self.last_look = 0

    @property
    def stage(self) -> int:
        """Number of the stage that it is in."""
        return self.place[0]

    def enter_stage(self, number: int) -> None:
        """A stage begins; what the one before has left may be what others wait for."""
        self.place = (number, 0, 0)
        self._lockstep.progressed()

    def stand_aside(self, epoch: int, position: int) -> None:
        """Wait until no other run has a batch before this one to take."""
        self.place = (self.stage, epoch, position)
        self._lockstep.pass_on(self)

    def wait_for_lock(self) -> None:
        """Let the others go on while another run, perhaps one of them, makes what is wanted."""
        self._lockstep.wait_for_lock(self)

    def share(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` has given to whichever run asked first for ``key``."""
        return self._lockstep.share(key, make)

    def give_turn(self) -> None:
        """Wake this run; called by the one whose turn it was."""
        self._turn.release()

    def await_turn(self) -> None:
        """Sleep until it is this run's turn."""
        self._turn.acquire()


class Lockstep:
    """Gives the turn to one of several runs after another.

    Args:
        labels: one for each run.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.size = len(labels)
        self.members = [Member(self, label) for label in labels]
        self._ended: dict[Member, Ended] = {}
        self._shared: dict[Hashable, Any] = {}
        self._events = 0
        self._looks = itertools.count(1)
        self._over = threading.Event()

    def run(self, work: Callable[[Member], T]) -> list[Ended[T]]:
        """Do ``work`` for every member, side by side; returns how each ended, in their order."""
        for member in self.members:
            threading.Thread(target=self._live, args=(member, work), daemon=True).start()
        self._next().give_turn()
        # Signals reach the main thread between two looks.
        while not self._over.wait(LOOK_SECONDS):
            pass
        return [self._ended[member] for member in self.members]

    def progressed(self) -> None:
        """A lock that some member waits for may be free now."""
        self._events += 1

    def share(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """See ``Member.share``."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def pass_on(self, member: Member) -> None:
        """Give the turn to whoever is to go next, which may be ``member`` itself."""
        chosen = self._next()
        if chosen is not member:
            states = generator_states()
            chosen.give_turn()
            member.await_turn()
            restore_generators([states])

    def wait_for_lock(self, member: Member) -> None:
        """``pass_on`` for a member that can do nothing until a lock is free."""
        member.locked_out_at, member.last_look = self._events, next(self._looks)
        self.pass_on(member)
        member.locked_out_at = None

    def _live(self, member: Member, work: Callable[[Member], T]) -> None:
        member.await_turn()
        try:
            ended = Ended(result=work(member))
        except BaseException as error:  # Whatever it is, the other runs go on.
            ended = Ended(error=error)
        self._ended[member] = ended
        self.progressed()
        if len(self._ended) == self.size:
            self._over.set()
        else:
            self._next().give_turn()

    def _next(self) -> Member:
        """The one that is furthest behind, after those that may now find their lock free."""
        alive = [member for member in self.members if member not in self._ended]
        locked_out = [member for member in alive if member.locked_out_at is not None]
        for member in locked_out:
            if member.locked_out_at < self._events:
                return member
        going = [member for member in alive if member.locked_out_at is None]
        if going:
            return min(going, key=lambda member: member.place)
        # All wait for runs of other processes: they look in turn.
        return min(locked_out, key=lambda member: member.last_look)
