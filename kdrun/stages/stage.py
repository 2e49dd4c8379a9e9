"""What a recipe is made of: stages that leave named artefacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from kdrun.data.module import DataModule
from kdrun.errors import UserError
from kdrun.interruption import SignalWatch
from kdrun.lockstep import Member
from kdrun.logs import Console
from kdrun.parameters import checked_constructor
from kdrun.process import device_errors_told
from kdrun.store import Artefact, Store
from kdrun.tasks.task import Task

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


class Artefacts(dict[str, Artefact]):
    """What the stages so far have left, by the stage's name."""

    def __missing__(self, name: str) -> Artefact:
        raise UserError(
            f"the recipe has no stage {name} before one that needs what it makes; "
            f"do not take recipe.stages.{name} out"
        )


@dataclass
class Context:
    """What every stage of one run works with.

    Attributes:
        config: the resolved configuration.
        names: the choice made in each config group (``{"student": "resnet18", ...}``).
        data: the data set, prepared.
        task: what the student must do.
        store: artefacts shared between runs.
        run_directory: what belongs to this run alone.
        console: lines for the user.
        watch: signals that ask for an early end.
        loggers: external loggers, which get every epoch's metrics.
        artefacts: what the stages so far have left, by the stage's name.
        result: what goes into ``result.json``.
        limit_batches: batches per epoch in a trial; None: all.
        networks: frozen networks that a stage has adapted, by config entry; they take the place of
            what the stage of that name left.
        member: this run among those that go side by side with it; None: it goes alone.
    """

    config: dict[str, Any]
    names: dict[str, str]
    data: DataModule
    task: Task
    store: Store
    run_directory: Path
    console: Console
    watch: SignalWatch
    loggers: list[Logger] = field(default_factory=list)
    artefacts: Artefacts = field(default_factory=Artefacts)
    result: dict[str, Any] = field(default_factory=dict)
    limit_batches: int | None = None
    member: Member | None = None
    networks: dict[str, nn.Module] = field(default_factory=dict)


class Stage:
    """One phase of a recipe.

    A stage whose artefact depends on part of the configuration only is ``shared``: its product lies
    in the store under a fingerprint of ``key`` and is made once for all runs that need it. The
    product of any other stage lies in the run's directory.

    Class attributes:
        kind: folder of the store, and the word used in messages.
        shared: whether the product lies in the store.
    """

    kind: ClassVar[str] = "artefact"
    shared: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Values out of range are refused wherever a stage is built, not only by the command line.
        if "__init__" in vars(cls):
            cls.__init__ = checked_constructor(cls.__init__)

    def run(self, context: Context, name: str) -> None:
        """Make the artefact, or find it, and leave it in ``context.artefacts[name]``."""
        if not self.wanted(context):
            return
        key = self.key(context)

        def produce(directory: Path) -> None:
            with device_errors_told():
                self.produce(context, name, directory)

        if self.shared:
            artefact, found = context.store.obtain(self.kind, key, produce)
            if found:
                context.console.say(f"{name}: found in the store ({artefact.name})")
        else:
            produce(context.run_directory)
            artefact = Artefact(context.run_directory, key)
        context.artefacts[name] = artefact
        context.networks |= self.adapted(context, name)

    def check(self, config: Mapping[str, Any], data: DataModule) -> None:
        """Refuse what cannot go through this stage, before any stage begins.

        Raises:
            UserError: says what to change.
        """

    def wanted(self, context: Context) -> bool:
        """Whether this run needs the stage at all."""
        return True

    def key(self, context: Context) -> dict[str, Any]:
        """Everything that the artefact depends on, as plain values."""
        return {}

    def adapted(self, context: Context, name: str) -> dict[str, nn.Module]:
        """Frozen networks that this stage has adapted, by config entry; default: none.

        Asked once the artefact is there, in its own run and by later commands on that run.

        Raises:
            UserError: the adapted network does not fit this data.
        """
        return {}

    def tested(self, context: Context) -> dict[str, nn.Module]:
        """Networks that this stage has trained and that are tested beside student and teachers.

        By what ``kdrun.stages.evaluate.results_on_test`` calls them; default: none. Asked once the
        artefact is there, in its own run and by later commands on that run.
        """
        return {}

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Write the artefact's files into ``directory``, which may hold an interrupted attempt."""
        raise NotImplementedError
