"""SIGINT and SIGTERM: finish the step, save, and say how to go on; a second signal ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import ClassVar


class Stopped(Exception):
    """Training was asked to stop and has saved its state."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class SignalWatch:
    """While active, the first SIGINT or SIGTERM only sets ``received``.

    The training loop reads that attribute once a step. A second signal falls through to the
    previous handler, so an impatient user can always end the process.

    Watches may be nested (a table around its runs): all that are active receive a signal, so that
    none is lost with a run that ends before it has looked. Outside the main thread Python cannot
    install handlers; a watch there is told by those of the main thread.
    """

    latest: ClassVar[int] = 0
    """The last signal that any watch of this process has received; 0: none."""
    _active: ClassVar[list[SignalWatch]] = []

    def __init__(self) -> None:
        self.received: int = 0
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        elif self._active:
            self.received = self._active[0].received
        self._active.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self not in self._active:
            return
        if self._previous:
            # Also after a signal: a trainer that was running then has put back what it had found.
            self._restore(all_of_them=bool(self.received))
        self._active.remove(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        SignalWatch.latest = number
        for watch in self._active:
            watch.received = number
        self._restore(all_of_them=True)

    def _restore(self, all_of_them: bool) -> None:
        """Put back what this watch, or the outermost one, has found."""
        outermost = next(watch for watch in self._active if watch._previous)
        found = outermost if all_of_them else self
        for number, handler in found._previous.items():
            signal.signal(number, handler)

    def raise_if_received(self) -> None:
        """Raise ``Stopped`` where the state needs no saving (between two stages)."""
        if self.received:
            raise Stopped(self.received)
