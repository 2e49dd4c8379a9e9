"""The contract of a distillation method.

A method is one ``nn.Module`` in one file under ``kdrun/methods/``. Its keyword-only constructor
arguments are the keys of ``conf/method/<slug>.yaml``; their annotations (``kdrun.parameters``) are
the types and ranges that the command line checks. The engine drives the life cycle below; a method
knows nothing of the trainer, of configuration, of devices or of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import checked_constructor

Taps = Mapping[str, tuple[str, ...]]
"""Role (``student``, ``teacher``, ...) to the names of the activations wanted from it."""


class Selection(NamedTuple):
    """Rows of a pool, in the order in which they were chosen.

    Attributes:
        rows: ``(count,)`` int64.
        radii: distance of each from the nearest of what was known or chosen before it, where rows
            are chosen by distance.
    """

    rows: Tensor
    radii: Tensor | None = None


@runtime_checkable
class Acquisition(Protocol):
    """A method that chooses, after each round of training, which samples get a label.

    Attributes:
        rounds: rounds after the first; each begins with more labels.
        queries: labels bought between two rounds; None: as many as there are classes.
        final_epochs: epochs of the last round; None: as many as of the others.
    """

    rounds: int
    queries: int | None
    final_epochs: int | None

    def select(
        self, pool: ModelOutput, labelled: ModelOutput, target: Tensor, count: int, seed: int
    ) -> Selection:
        """Choose ``count`` rows of the pool.

        Args:
            pool: the student's output, with its taps, on the samples without labels.
            labelled: likewise on those with labels.
            target: the labels of the latter ``(M,)``.
            count: how many.
            seed: of random choices.
        """


class Engine(Protocol):
    """What a method with an irregular step may ask of the engine (see ``Method.step``)."""

    def forward(self, role: str, batch: Batch) -> ModelOutput:
        """Run the network of ``role``; gradients flow if that role is trainable."""

    def optimize(self, loss: Tensor, *roles: str) -> None:
        """Zero the gradients of ``roles``, back-propagate ``loss`` and step their optimisers."""


class Method(nn.Module):
    """Base of every method. Only ``losses`` must be written.

    Class attributes:
        relational: the loss compares samples of a batch with each other, so it depends on how
            batches are drawn and split; such a method says in its docstring what it sees across
            ranks.
        ordered: the loss depends on the order of the samples in a batch: it compares neighbours, or
            draws random numbers row by row.
        trainable_roles: roles besides the student that are trained with it, each with its own
            optimiser and schedule (``("teacher",)`` for online distillation).
        tasks: the tasks that the method supports, empty for any; the contract tests run each of
            them.
        needs: names of the inputs that the loss itself reads from a batch; a data set without them
            is refused.
        views: names of further augmented views that batches must carry, e.g. ``("strong",)``; the
            engine runs every network on each and hands over ``output.views[name]``.
        unlabelled: the method learns from samples without labels too; batches carry them as
            ``batch.unlabelled``, and the engine hands over ``output.unlabelled``.
        joint: labelled and unlabelled samples are run as one batch, not one after the other.
        zero_at_equality: all distillation terms vanish when student and teacher agree.
        offline: the teacher's knowledge is in the data that an earlier stage made; it is not run in
            the steps, and ``losses`` is given no output of it.
        lazy_logits: logits are read by losses that can compute them piece by piece
            (``kdrun.outputs.HeadLogits``), where the task hands them over so.
        detached: the student's own outputs are held constant in parts of the loss, so that its
            gradient is that of no single function.
        irregular: the method takes its own optimiser steps in ``step``.
    """

    relational: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    trainable_roles: ClassVar[tuple[str, ...]] = ()
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    needs: ClassVar[tuple[str, ...]] = ()
    views: ClassVar[tuple[str, ...]] = ()
    unlabelled: bool = False
    joint: bool = False
    zero_at_equality: ClassVar[bool] = False
    offline: ClassVar[bool] = False
    lazy_logits: ClassVar[bool] = False
    detached: ClassVar[bool] = False
    irregular: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Values out of range are refused wherever a method is built, not only by the command line.
        cls.__init__ = checked_constructor(cls.__init__)

    def __init__(self) -> None:
        super().__init__()
        self.supervised_loss: Callable[[ModelOutput, Batch], Tensor] = _cross_entropy
        self._recorded: dict[str, Tensor] = {}

    # -- before training ---------------------------------------------------------------------

    def inspect(self, batches: Iterable[Batch]) -> None:
        """Look at the training data before anything is trained; default: nothing.

        Args:
            batches: an epoch of the training split on the CPU, made as it is asked for.

        Raises:
            ValueError: the method cannot learn from such data; says why.
        """

    def roles(self) -> Mapping[str, str]:
        """The networks wanted besides the student: role to the config entry that describes it.

        A frozen role takes the weights that the stage of that name left; a role in
        ``trainable_roles`` starts from fresh ones (``{"peer1": "student"}``: a second student), or
        from the checkpoint of that entry, and is trained with that entry's settings.
        """
        return {"teacher": "teacher"}

    def taps(self) -> Taps:
        """The activations wanted from each role.

        Names: ``stages`` (every stage), ``stage1``, ``stage2`` ... , ``stem``, ``penultimate``
        (pooled vector before the classifier), any of them with ``.preactivation``, and
        ``module:<path>`` / ``input:<path>`` for the output / input of any sub-module.
        """
        return {}

    def wrap(self, student: nn.Module, teachers: Mapping[str, nn.Module], sample: Any) -> nn.Module:
        """Give the student what the method needs (a second head, exits); default: nothing.

        Args:
            student: the network to train.
            teachers: the other networks by role; their parts may be looked at and copied.
            sample: inputs of two samples, for networks that do not declare where their taps are.
        """
        return student

    def wrap_teachers(
        self, teachers: Mapping[str, nn.Module], sample: Any
    ) -> Mapping[str, nn.Module]:
        """The networks that take part in place of the teachers (built around them); by role.

        Default: the teachers themselves. Called before ``wrap``.

        Args:
            teachers: the networks of ``roles``.
            sample: inputs of two samples.
        """
        return teachers

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build trainable helpers (projectors, embeddings) from the shapes of one dry forward.

        The outputs hold real tensors of a two-sample batch with every requested tap.
        """

    def prepare(self, teachers: Mapping[str, nn.Module], loader: Iterable[Batch]) -> None:
        """Gather statistics in one pass over the training data before the first step.

        Args:
            teachers: the frozen networks by role, on the device.
            loader: every labelled sample of the training split once, not augmented; of several
                processes each has its part, which may end in a batch of no samples.
        """

    # -- every step --------------------------------------------------------------------------

    def augment(self, batch: Batch) -> Batch:
        """Change the batch before any network sees it (mixup, further views)."""
        return batch

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The named scalar terms of the objective, unweighted, the supervised one among them.

        Args:
            student: the student's output with the requested taps.
            teachers: output by role; gradients flow only into trainable roles.
            batch: the batch both saw; ``batch.mask`` marks the positions that count.
            progress: where training stands.

        Returns:
            Scalars by name. The engine multiplies each with ``weights`` and sums them.
        """
        raise NotImplementedError

    def weights(self, progress: Progress) -> dict[str, float]:
        """The factor of each term now; a term that is not named counts once."""
        return {}

    def step(self, engine: Engine, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """One irregular training step (bilevel, adversarial, alternating); returns its terms.

        Called instead of ``losses`` where ``irregular`` is true.
        """
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """Update schedules and memories once the optimiser has stepped.

        State that must survive a restart belongs in buffers.
        """

    def record(self, name: str, value: Tensor) -> None:
        """Note a scalar diagnostic of this step; the engine logs its mean over the epoch."""
        self._recorded[name] = value.detach()

    def take_recorded(self) -> dict[str, Tensor]:
        """Hand over and forget what ``record`` collected since the last call."""
        recorded, self._recorded = self._recorded, {}
        return recorded

    # -- after training ----------------------------------------------------------------------

    def calibrate(self, student: nn.Module, outputs: Iterable[tuple[ModelOutput, Batch]]) -> None:
        """Choose what the student's predictions depend on besides its weights, and what only
        held-out data can tell (a weight between heads, a temperature); it belongs in buffers.

        Called before each validation.

        Args:
            student: the deployed network, in evaluation mode.
            outputs: its output on each validation batch, with the taps of the student; the network
                is run as they are asked for.
        """

    def deploy(self, student: nn.Module) -> nn.Module:
        """The network that is evaluated and shipped; shares its weights with ``student``."""
        return student

    def companions(self, student: nn.Module) -> dict[str, nn.Module]:
        """Further networks that were trained with the student, by name: exits, ensembles.

        They are evaluated on the test set beside the student after its last epoch, and do not ship.
        They may share the weights of ``student`` and of the method.
        """
        return {}


def _cross_entropy(output: ModelOutput, batch: Batch) -> Tensor:
    """Mean cross-entropy; the task replaces it with its own supervised loss."""
    return torch.nn.functional.cross_entropy(output.logits, batch.target)
