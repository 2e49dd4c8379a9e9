"""``python -m kdrun`` and the console script ``kdrun``."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    # Nothing made while a command is read is garbage soon; a run turns the collector on again.
    gc.disable()
    from kdrun.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
