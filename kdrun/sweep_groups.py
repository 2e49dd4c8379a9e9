"""Runs of a sweep that go side by side: all of a group when the first of them comes up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.catalogue import Catalogue
from kdrun.identity import run_directory
from kdrun.members import AT_ONCE, LARGEST_GROUP, MemberRun, group_of, member_run
from kdrun.overrides import Override

if TYPE_CHECKING:
    from kdrun.run import Outcome

LARGEST_GRID = 1000
"""Runs of a grid in which groups are looked for."""


@dataclass
class Groups:
    """Does the runs of a sweep in one process, those with a common ``data_seed`` side by side.

    Attributes:
        overrides: of the sweep.
    """

    overrides: Sequence[Override]
    _runs: dict[Path, MemberRun] = field(default_factory=dict)
    _ended: dict[Path, Outcome | BaseException] = field(default_factory=dict)

    def run(self, words: Sequence[str], flags: Sequence[str], catalogue: Catalogue) -> Outcome:
        """``kdrun.run.run`` for a run of the sweep, which may have been done beside another."""
        from kdrun.run import run, run_beside

        wanted = self._member(words, catalogue)
        place = _place(wanted)
        if place not in self._ended:
            group = self._beside(wanted, catalogue)
            if len(group) == 1:
                return run(words, flags, catalogue)
            self._ended |= zip(map(_place, group), run_beside(group, flags), strict=True)
        ended = self._ended[place]
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _beside(self, wanted: MemberRun, catalogue: Catalogue) -> list[MemberRun]:
        """A run and those to come that may go beside it."""
        name = group_of(wanted.config.values)
        if not name:
            return [wanted]
        if not self._runs:
            found = (self._member(words, catalogue) for words in _grid(self.overrides))
            self._runs = {_place(member): member for member in found}
        others = [
            other
            for place, other in self._runs.items()
            if place not in (*self._ended, _place(wanted)) and group_of(other.config.values) == name
        ]
        return [wanted, *others][: wanted.config.values[AT_ONCE] or LARGEST_GROUP]

    def _member(self, words: Sequence[str], catalogue: Catalogue) -> MemberRun:
        varied = {override.key for override in self.overrides if override.is_sweep}
        label = " ".join(word for word in words if word.partition("=")[0] in varied)
        return member_run(label, words, catalogue)


def _grid(overrides: Sequence[Override]) -> list[list[str]]:
    """The words of every run."""
    spelled = [
        [f"{o.key}={value}" for value in o.values] if o.is_sweep else [o.word] for o in overrides
    ]
    return list(map(list, itertools.islice(itertools.product(*spelled), LARGEST_GRID)))


def _place(member: MemberRun) -> Path:
    return run_directory(member.config.values, member.config.names)
