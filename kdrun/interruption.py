"""SIGINT and SIGTERM: finish the step, save, and say how to go on; a second signal ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Stopped(Exception):
    """Training was asked to stop and has saved its state."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class SignalWatch:
    """While active, the first SIGINT or SIGTERM only sets ``received``.

    The training loop reads that attribute once a step. A second signal falls through to the
    previous handler, so an impatient user can always end the process. Outside the main thread,
    where Python cannot install handlers, the watch does nothing.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also after a signal: a trainer that was running then has put back what it had found.
        self._restore()
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raise_if_received(self) -> None:
        """Raise ``Stopped`` where the state needs no saving (between two stages)."""
        if self.received:
            raise Stopped(self.received)


def exit_code(signal_number: int) -> int:
    """The shell's status for a process ended by this signal: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + signal_number
