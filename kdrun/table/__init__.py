"""Tables of experiments: one config file to all its runs, by any number of processes."""

from kdrun.table.command import main

__all__ = ["main"]
