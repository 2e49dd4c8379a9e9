"""Numbers that go wrong: a loss or gradient that is infinite or no number ends, or skips, its step.

Two scalars tell of nearly every such step: the loss, and the sum of one vector's gradient near the
input, where whatever backward spoils arrives. On a CPU they are read at once, before the update. On
a GPU reading would wait for the device, so they stay there for ``WINDOW`` steps; the steps taken in
between are lost, since nothing is saved before the scalars are read. What both miss (a gradient of
the last layer alone) is found in the weights before anything is saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kdrun import distributed
from kdrun.errors import UserError

if TYPE_CHECKING:
    from kdrun.distiller import Distiller
    from kdrun.outputs import Batch

Reaction = Literal["stop", "skip"]
REPORT = "nonfinite.json"
WINDOW = 32
"""Steps between two readings of what is kept on a GPU."""
EXCHANGE = 16
"""Steps between two readings in a distributed run, where ranks must find out together."""


@dataclass
class Finding:
    """The first step at which something was not finite.

    Attributes:
        epoch: of the step, counted from 1; ``step``: within the epoch, counted from 1.
        what: what was not finite, in words.
        terms: the value of each loss term at that step.
        samples: indices of the batch's samples in the data set.
    """

    epoch: int
    step: int
    what: str
    terms: dict[str, float] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)


class NonFinite(UserError):
    """Training met a number that is not finite and was to stop there; the exit status is 1."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(
            f"{finding.what} at epoch {finding.epoch}, step {finding.step}", exit_code=1
        )

    def describe(self, name: str, report: Any, kept: str) -> NonFinite:
        """The same with the training's name, where the facts were written and what is kept."""
        self.args = (
            f"{name}: {self}; its samples are listed in {report}, {kept}. A smaller "
            "training.optimizer.lr or a training.clip_norm may help; training.nonfinite=skip "
            "leaves such updates out",
        )
        return self

    def facts(self) -> dict[str, Any]:
        """The finding as plain values; a JSON document has no word for these numbers."""
        terms = {name: repr(value) for name, value in self.finding.terms.items()}
        return {"error": str(self)} | asdict(self.finding) | {"terms": terms}


class FiniteGuard:
    """Watches the steps of one training.

    Args:
        module: the training; its optimisers exist.
        reaction: ``stop`` raises ``NonFinite``; ``skip`` leaves the update out, puts back the
            buffers (running statistics, memories) and goes on. Skipping reads the device at every
            step and looks at every gradient.
        parameters: what each optimiser trains.
    """

    def __init__(
        self, module: Distiller, reaction: Reaction, parameters: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        self.module = module
        self.skips = reaction == "skip"
        self.skipped = 0
        """Updates left out in this epoch."""
        alone = distributed.world_size() == 1
        on_cpu = all(p.device.type == "cpu" for group in parameters for p in group)
        self._at_once = self.skips or (alone and on_cpu)
        self._window = WINDOW if alone else EXCHANGE
        self._parameters = parameters
        # A bias or a normalisation's factors: as near to the input as the weights, but small.
        self._probes = [next((p for p in g if p.ndim == 1), g[0]) for g in parameters]
        self._buffers = list(module.buffers()) if self.skips else []
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._batch: Batch | None = None
        self._before: tuple[int, int, Tensor] | None = None
        self._finding: Finding | None = None
        self._pending: list[_Step] = []

    # -- within a step -------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """A step on ``batch`` begins."""
        self._batch = batch
        if self._kept:
            torch._foreach_copy_(self._kept, self._buffers)
        if not self._at_once:
            module = self.module
            self._pending.append(_Step(module.epoch, module.position, batch.index))

    def accepts(self, terms: Mapping[str, Tensor]) -> bool:
        """Whether terms may be counted in the sums of the epoch; asks only where steps skip."""
        return not self.skips or all(math.isfinite(term.item()) for term in terms.values())

    def watch(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Batch | None = None) -> None:
        """Look at a loss that is about to be back-propagated, on ``batch`` or all of the step's."""
        if not self._at_once:
            self._pending[-1].add(loss, terms)
        elif not math.isfinite(loss.item()) and self._finding is None:
            values = {name: term.item() for name, term in terms.items()}
            self._find(_in_words(values, loss.item()), values, batch)

    def permits(self, number: int, norm: Tensor | None) -> bool:
        """Whether optimiser ``number`` may use its gradients, whose norm may be known already."""
        if self.skips:
            bad = self._finding is not None or not self._gradients_finite(number)
            if max(distributed.gather_objects(bad)):
                self._find("the gradient is not finite")
            return self._finding is None
        gradient = self._probes[number].grad
        probe = norm
        if probe is None:
            if gradient is None:
                return self._finding is None
            probe = gradient.sum()
        if not self._at_once:
            self._pending[-1].probes.append(probe.detach())
            return True
        if not math.isfinite(probe.item()):
            self._find(self._gradient_in_words())
        return self._finding is None

    def end(self) -> None:
        """The step is over: raise, or put back what a skipped step has changed.

        Raises:
            NonFinite: something was not finite.
        """
        if self._finding is not None:
            if not self.skips:
                raise NonFinite(self._finding)
            self._finding = None
            self.skipped += 1
            if self._kept:
                torch._foreach_copy_(self._buffers, self._kept)
        elif self._at_once:
            module = self.module
            self._before = (module.epoch, module.position, self._batch.index)
        elif len(self._pending) >= self._window:
            self.read()

    # -- between steps -------------------------------------------------------------------------

    def read(self) -> None:
        """Read what is kept on the device; every rank must ask at the same step.

        Raises:
            NonFinite: one of those steps went wrong.
        """
        if self._at_once:
            return
        found = self._first_of_pending()
        self._pending.clear()
        findings = [f for f in distributed.gather_objects(found) if f is not None]
        if not findings:
            return
        first = min((f.epoch, f.step) for f in findings)
        findings = [f for f in findings if (f.epoch, f.step) == first]
        # The rank whose own loss went wrong knows why; the others see the common gradient.
        named = [f for f in findings if not f.what.startswith("the gradient")]
        finding = (named or findings)[0]
        finding.samples = [i for f in named or findings for i in f.samples]
        raise NonFinite(finding)

    def check(self) -> None:
        """Make sure that what is about to be saved is sound; every rank must ask.

        Raises:
            NonFinite: a step since the last reading went wrong, or weights are not finite.
        """
        self.read()
        spoilt = next(_not_finite(self.module), None)
        if max(distributed.gather_objects(spoilt is not None)):
            raise NonFinite(self._spoilt(spoilt or "another process"))

    # -- what went wrong -----------------------------------------------------------------------

    def _find(
        self, what: str, values: dict[str, float] | None = None, batch: Batch | None = None
    ) -> None:
        if self._finding is not None:
            return
        spoilt = None if self.skips else next(_not_finite(self.module), None)
        if spoilt is not None:
            # Not this step's doing: the update before it left weights behind that are no numbers.
            self._finding = self._spoilt(spoilt)
            return
        index = (batch or self._batch).index
        module = self.module
        self._finding = Finding(
            module.epoch + 1, module.position + 1, what, values or {}, index.tolist()
        )

    def _spoilt(self, name: str) -> Finding:
        what = f"the update of {name} is not finite"
        if self._before is None:
            return Finding(self.module.epoch + 1, self.module.position, what)
        epoch, position, index = self._before
        return Finding(epoch + 1, position + 1, what, {}, index.tolist())

    def _gradients_finite(self, number: int) -> bool:
        gradients = [p.grad for p in self._parameters[number] if p.grad is not None]
        # A sum is not finite if anything in it is not, and costs one kernel in place of two.
        return not gradients or bool(torch.stack([g.sum() for g in gradients]).isfinite().all())

    def _gradient_in_words(self) -> str:
        """The gradient, and the terms it comes from where a second pass can tell."""
        if self.module.method.irregular:
            return "the gradient is not finite"
        norms = self.module.gradient_norms(self._batch)
        names = [name for name, norm in norms.items() if not math.isfinite(norm)]
        of = f" of the loss term {' and '.join(names)}" if names else ""
        return f"the gradient{of} is not finite"

    def _first_of_pending(self) -> Finding | None:
        steps = [step for step in self._pending if step.losses or step.probes]
        if not steps:
            return None
        totals = torch.stack([step.total() for step in steps]).tolist()
        for step, total in zip(steps, totals, strict=True):
            if not math.isfinite(total):
                return step.finding()
        return None


@dataclass
class _Step:
    """What is kept of a step until it is read."""

    epoch: int
    position: int
    index: Tensor
    losses: list[Tensor] = field(default_factory=list)
    terms: list[dict[str, Tensor]] = field(default_factory=list)
    probes: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        self.losses.append(loss.detach())
        self.terms.append({name: term.detach() for name, term in terms.items()})

    def total(self) -> Tensor:
        """Not finite if anything of the step is not."""
        return torch.stack([value.double() for value in (*self.losses, *self.probes)]).sum()

    def finding(self) -> Finding:
        what, values = "the gradient is not finite", {}
        for loss, terms in zip(self.losses, self.terms, strict=True):
            if not math.isfinite(loss.item()):
                values = {name: term.item() for name, term in terms.items()}
                what = _in_words(values, loss.item())
                break
        return Finding(self.epoch + 1, self.position + 1, what, values, self.index.tolist())


def _in_words(terms: Mapping[str, float], loss: float) -> str:
    bad = {name: value for name, value in terms.items() if not math.isfinite(value)}
    if not bad:
        return f"the sum of the loss terms is {loss}"
    return "the loss term " + " and ".join(f"{name} is {value}" for name, value in bad.items())


def _not_finite(module: Distiller) -> Iterator[str]:
    """Names of parameters and running statistics of trained networks that are not finite."""
    state = [*module.named_parameters(), *module.networks.named_buffers(prefix="networks")]
    for name, value in state:
        if value.is_floating_point() and not value.isfinite().all():
            yield name.removeprefix("networks.")
