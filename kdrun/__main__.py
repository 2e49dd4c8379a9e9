"""``python -m kdrun`` and the console script ``kdrun``."""

from __future__ import annotations

import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    # Nothing made while a command is read is garbage soon; a run turns the collector on again.
    gc.disable()
    if "RANK" in os.environ:
        # One of several processes: until it watches for signals itself, one ends it where it is,
        # without a word. Python's own way would show an import, or a connection, that broke off.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from kdrun.cli import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
