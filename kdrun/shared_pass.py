"""One pass over the training data, and one forward of each frozen network, for several runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdrun.data.loader import Loader
from kdrun.errors import UserError
from kdrun.forward import run_network
from kdrun.layers.taps import Taps
from kdrun.lockstep import Member
from kdrun.outputs import Batch, ModelOutput
from kdrun.tasks.task import Task

Views = tuple[str, ...]


class SharedPass:
    """The batches of a training, each made once, and what frozen networks say of them.

    Args:
        make_loader: gives the loader of batches with the given views.
    """

    def __init__(self, make_loader: Callable[[Views], Loader]) -> None:
        self._make_loader = make_loader
        self._views: Views = ()
        self._loader: Loader | None = None
        self._networks: dict[str, SharedNetwork] = {}
        self._place: tuple[int, int] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._batch: Batch | None = None
        self._common = _Common()

    def join(self, views: Views) -> None:
        """From now on batches carry these views too."""
        if not set(views) <= set(self._views):
            self._views = _union(self._views, views)
            self._loader = self._place = None

    def network(self, name: str, network: nn.Module, task: Task) -> SharedNetwork:
        """The frozen network of a name; ``network`` is it if nobody has brought it before."""
        if name not in self._networks:
            self._networks[name] = SharedNetwork(network, task)
        return self._networks[name]

    def batch(self, epoch: int, position: int) -> Batch:
        """Batch number ``position`` of ``epoch``; an object of one's own around common tensors."""
        if self._loader is None:
            self._loader = self._make_loader(self._views)
        if self._place != (epoch, position):
            if self._place is None or self._place != (epoch, position - 1):
                self._loader.set_epoch(epoch, position)
                self._batches = iter(self._loader)
            self._batch, self._place = next(self._batches), (epoch, position)
            self._common = _Common(self._batch)
            for network in self._networks.values():
                network.forget()
        else:
            # Whoever took it as the last batch of a training has asked for no other.
            self.check_unchanged("the method of a run beside it")
        return replace(self._batch, views=dict(self._batch.views))

    def check_unchanged(self, whose: str) -> None:
        """Make sure that whoever had the turn has written into nothing that others read.

        Args:
            whose: method that was, in words.

        Raises:
            UserError: it has.
        """
        for name, common in (
            ("batch", self._common),
            *((f"outputs of {name}", network.common) for name, network in self._networks.items()),
        ):
            if common.changed():
                raise UserError(
                    f"{whose} changes the {name} in place, which runs side by side share: "
                    "run it by itself"
                )


class SharedNetwork:
    """A frozen network that runs once per batch, whoever asks first.

    Args:
        network: stays where it is; its gradients are turned off.
        task: how networks read a batch.

    Attributes:
        common: its outputs on the present batch.
    """

    def __init__(self, network: nn.Module, task: Task) -> None:
        self.network, self.task = network.requires_grad_(False).eval(), task
        self._taps = _JointTaps()
        self._views: Views = ()
        self._outputs: dict[tuple[int, int], ModelOutput] = {}
        self.common = _Common()

    def stand_in(self, taps: Taps | None, views: Views) -> Callable[[Batch], ModelOutput]:
        """What gives this network's outputs on shared batches.

        Args:
            taps: of a network like this one, whose features are wanted.
            views: names of the further views on which it is to run.
        """
        prefix = self._taps.add(taps and taps.placed_in(self.network))
        self._views = _union(self._views, views)
        self.forget()

        def speak(batch: Batch) -> ModelOutput:
            return _own(self._output(batch), prefix)

        return speak

    def forget(self) -> None:
        """Another batch is about to come."""
        self._outputs, self.common = {}, _Common()

    def _output(self, batch: Batch) -> ModelOutput:
        # The batch, or rows of it where a step has several parts.
        rows = (batch.index.data_ptr(), len(batch))
        if rows not in self._outputs:
            with torch.no_grad():
                output = run_network(self.task, self.network, batch, self._taps, self._views)
            self._outputs[rows] = output
            self.common.add(output)
        return self._outputs[rows]


class FollowingLoader:
    """The loader of one of several runs: its batches are those of the shared pass.

    Args:
        member: the run.
        shared: the pass.
        own: the loader that the run would have had alone.
    """

    def __init__(self, member: Member, shared: SharedPass, own: Loader) -> None:
        self.member, self.shared, self.own = member, shared, own
        self._epoch = self._start = 0

    def __len__(self) -> int:
        return len(self.own)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what the next iteration gives: ``epoch`` without its first ``start`` batches."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        for position in range(self._start, len(self)):
            # The next batch is asked for before anybody else has the turn.
            self.shared.check_unchanged("the method")
            self.member.stand_aside(self._epoch, position)
            yield self.shared.batch(self._epoch, position)

    def replay(self, epoch: int, position: int) -> Batch:
        """Batch number ``position`` of ``epoch``."""
        return self.own.replay(epoch, position)


class _JointTaps:
    """Several runs' taps of one network, read in one forward; features are told by a prefix."""

    def __init__(self) -> None:
        self._taps: dict[str, Taps] = {}
        self._count = 0
        self._stack = ExitStack()

    def add(self, taps: Taps | None) -> str:
        """Read these too; returns their prefix."""
        self._count += 1
        prefix = f"{self._count}/"
        if taps is not None:
            self._taps[prefix] = taps
        return prefix

    def __enter__(self) -> _JointTaps:
        for taps in self._taps.values():
            self._stack.enter_context(taps)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def collect(self) -> dict[str, Tensor]:
        """The features of the last forward."""
        return {
            prefix + name: feature
            for prefix, taps in self._taps.items()
            for name, feature in taps.collect().items()
        }


class _Common:
    """Tensors that nobody may write into."""

    def __init__(self, *values: object) -> None:
        self._tensors: list[tuple[Tensor, int]] = []
        for value in values:
            self.add(value)

    def add(self, value: object) -> None:
        """Watch the tensors in a nested value from now on."""
        self._tensors += [(tensor, tensor._version) for tensor in _tensors(value)]

    def changed(self) -> bool:
        """Whether one of them has been written into."""
        return any(tensor._version != version for tensor, version in self._tensors)


def _own(output: ModelOutput, prefix: str) -> ModelOutput:
    """An output of one's own around common tensors, with one's own features."""
    features = {
        name.removeprefix(prefix): feature
        for name, feature in output.features.items()
        if name.startswith(prefix) or not name.partition("/")[0].isdecimal()
    }
    views = {name: _own(view, prefix) for name, view in output.views.items()}
    return replace(output, features=features, extra=dict(output.extra), views=views)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Batch):
        yield from _tensors([value.inputs, value.target, value.mask, value.views])
    elif isinstance(value, ModelOutput):
        yield from _tensors([value.logits, value.features, value.extra, value.views])
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _union(first: Views, second: Views) -> Views:
    return tuple(dict.fromkeys([*first, *second]))
