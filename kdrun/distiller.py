"""The one LightningModule: a training step of any method.

Lightning brings devices, precision and process groups. What it would do at every step (move the
batch, wrap the optimiser, log) costs more than a step of a small network, so the trainer is handed
blocks of batches, sums stay on the device until they are read, and optimisation is manual.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdrun import distributed
from kdrun.errors import UserError
from kdrun.forward import run_network
from kdrun.layers.taps import Taps
from kdrun.method import Method
from kdrun.nonfinite import FiniteGuard, Reaction
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.tasks.task import Task
from kdrun.term_sums import TermSums, shares_of_step

STUDENT = "student"

StandIn = Callable[[Batch], ModelOutput]
"""What gives the outputs of a frozen network without the network."""

MakeOptimizer = Callable[[Sequence[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Optimization:
    """How the trainable networks are optimised.

    Attributes:
        optimizer: parameters to an optimiser.
        scheduler: optimiser to its schedule, stepped once per optimiser step; None: constant.
        accumulate: parts into which each batch is cut before one optimiser step.
        clip_norm: largest norm of a network's gradient; None: not clipped.
        ema_decay: decay per step of the averaged student that is evaluated; None: no average.
        nonfinite: what a loss or gradient that is not finite does: stop, or skip the update.
        of_roles: optimiser and schedule of the trained roles that have their own.
    """

    optimizer: MakeOptimizer
    scheduler: MakeScheduler | None
    accumulate: int = 1
    clip_norm: float | None = None
    ema_decay: float | None = None
    nonfinite: Reaction = "stop"
    of_roles: Mapping[str, tuple[MakeOptimizer, MakeScheduler | None]] = field(default_factory=dict)


class Distiller(LightningModule):
    """Trains a student, and whatever a method trains beside it.

    Frozen networks are kept outside the module tree: they are in no optimiser, in no checkpoint and
    in no process group, and ``train()`` does not reach them.

    Args:
        task: what the student must do.
        method: the distillation method, already set up.
        student: the network to train, already wrapped by the method.
        teachers: further networks by role; trainable where the method says so, else frozen.
        taps: taps placed in the networks, by role.
        optimization: optimiser, schedule and the like.
        epochs: length of training.
        steps_per_epoch: batches in an epoch.
        stand_ins: who speaks for a further role that has no network here.
    """

    def __init__(
        self,
        *,
        task: Task,
        method: Method,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        taps: Mapping[str, Taps],
        optimization: Optimization,
        epochs: int,
        steps_per_epoch: int,
        stand_ins: Mapping[str, StandIn] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.task = task
        self.method = method
        trained = {role: teachers[role] for role in method.trainable_roles}
        self.networks = nn.ModuleDict({STUDENT: student, **trained})
        self.frozen = {role: net for role, net in teachers.items() if role not in trained}
        for network in self.frozen.values():
            network.requires_grad_(False).eval()
        self.optimization = optimization
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.average = None
        if optimization.ema_decay is not None:
            average = get_ema_multi_avg_fn(optimization.ema_decay)
            self.average = AveragedModel(student, multi_avg_fn=average, use_buffers=True)
            self.average.requires_grad_(False)
        # Who plays what, for quick look-up: network, its taps, and whether gradients flow.
        self._cast = {
            role: (network, taps.get(role), trainable)
            for networks, trainable in ((self.networks, True), (self.frozen, False))
            for role, network in networks.items()
        }
        self._stand_ins = dict(stand_ins or {})
        self._others = [*(role for role in self._cast if role != STUDENT), *self._stand_ins]
        if method.offline:
            self._others = [role for role in self._others if role in trained]
        self._views = method.views
        # Read by DistributedDataParallel. A method keeps its memories alike on all ranks itself;
        # sending them at every forward would cost more than the step.
        self._ddp_params_and_buffers_to_ignore = [
            f"method.{name}" for name, _ in method.named_buffers()
        ]
        self.epoch = 0
        self.position = 0
        self.step_count = 0
        self.sums = TermSums()
        self.gradient_shares: dict[str, float] = {}
        self.after_each_step: Callable[[], None] = lambda: None
        self.trained_on: Mapping[str, str] = {}
        """What weight files say of the data; see ``DataModule.signature``."""
        self.global_batch: Callable[[int], int] | None = None
        self.seconds_in_steps = 0.0

    # -- networks ------------------------------------------------------------------------------

    def network(self, role: str) -> nn.Module:
        """The network that plays a role, trained or frozen."""
        if role not in self._cast:
            raise KeyError(f"no network plays the role {role!r}; roles: {', '.join(self._cast)}")
        return self._cast[role][0]

    def let_stand_in(self, role: str, stand_in: StandIn) -> None:
        """Let ``stand_in`` speak for a role from now on, and give up its frozen network."""
        del self.frozen[role], self._cast[role]
        self._stand_ins[role] = stand_in

    def deployed(self) -> nn.Module:
        """The student as it is evaluated and shipped; the averaged one where there is one."""
        if self.average is not None:
            return self.method.deploy(self.average.module)
        return self.method.deploy(self.networks[STUDENT])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        # Frozen networks are not sub-modules, but follow the module to its device.
        for network in self.frozen.values():
            network._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, role: str, batch: Batch) -> ModelOutput:
        """Run the network of ``role`` on a batch and its views; taps are read."""
        if role in self._stand_ins:
            return self._stand_ins[role](batch)
        network, taps, trained = self._cast[role]
        with nullcontext() if trained else torch.no_grad():
            return run_network(self.task, network, batch, taps, self._views, self.method.joint)

    # -- optimisation --------------------------------------------------------------------------

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """One optimiser and schedule per trained role; the method's own parameters join the
        student's."""
        shared = (self.optimization.optimizer, self.optimization.scheduler)
        optimizers, schedulers = [], []
        for role, network in self.networks.items():
            parameters = [p for p in network.parameters() if p.requires_grad]
            if role == STUDENT:
                parameters += [p for p in self.method.parameters() if p.requires_grad]
            make_optimizer, make_scheduler = self.optimization.of_roles.get(role, shared)
            optimizers.append(make_optimizer(parameters))
            if make_scheduler is not None:
                schedulers.append(make_scheduler(optimizers[-1]))
        return optimizers, schedulers

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        """Loaders already deliver on the device."""
        return batch

    def prepare_steps(self) -> None:
        """Collect what the step needs once the optimisers exist, so that it looks nothing up."""
        optimizers = self.optimizers(use_pl_optimizer=False)
        self._optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self._schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self._trained_parameters = [
            [p for group in optimizer.param_groups for p in group["params"]]
            for optimizer in self._optimizers
        ]
        self.guard = FiniteGuard(self, self.optimization.nonfinite, self._trained_parameters)

    def training_step(self, block: list[Batch], block_index: int) -> None:
        """Take the optimiser steps of one block of batches."""
        started = time.perf_counter()
        for batch in block:
            self._step(batch)
        self.seconds_in_steps += time.perf_counter() - started

    def progress(self) -> Progress:
        """Where training stands."""
        total = self.epochs * self.steps_per_epoch
        return Progress(self.epoch, self.epochs, self.step_count, total)

    def _step(self, batch: Batch) -> None:
        progress = self.progress()
        self.guard.begin(batch)
        if self.method.irregular:
            terms = self.method.step(StepEngine(self), self.method.augment(batch), progress)
            counted = self.guard.accepts(terms)
            self.sums.add(terms, {}, self.method.take_recorded(), counted=counted)
        else:
            self._regular_step(batch, progress)
        self.guard.end()
        for scheduler in self._schedulers:
            scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.networks[STUDENT])
        self.method.after_step(progress)
        self.step_count += 1
        self.position += 1
        self.after_each_step()

    def _regular_step(self, batch: Batch, progress: Progress) -> None:
        parts = self._parts(batch)
        samples = self._samples_of_step(batch)
        for part, share in zip(parts, shares_of_step(parts, samples), strict=True):
            terms = self._terms(part, progress)
            weights = self.method.weights(progress)
            if self.step_count == 0 and not self.gradient_shares:
                self.gradient_shares = self._measure_gradients(terms, weights)
            counted = self.guard.accepts(terms)
            recorded = self.method.take_recorded()
            loss = self.sums.add(terms, weights, recorded, share, counted=counted)
            self.guard.watch(loss, terms, part)
            self._backward(loss)
        self._update(range(len(self._optimizers)))

    def _terms(self, part: Batch, progress: Progress) -> Mapping[str, Tensor]:
        part = self.method.augment(part)
        teachers = {role: self.forward(role, part) for role in self._others}
        return self.method.losses(self.forward(STUDENT, part), teachers, part, progress)

    def _update(self, which: Sequence[int]) -> None:
        norm = None
        for number in which:
            if self.optimization.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(
                    self._trained_parameters[number], self.optimization.clip_norm
                )
            if self.guard.permits(number, norm):
                self._optimizers[number].step()
            self._optimizers[number].zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor) -> None:
        if distributed.world_size() > 1:
            self.manual_backward(loss)
        else:
            loss.backward()

    def _parts(self, batch: Batch) -> list[Batch]:
        # As many on every rank, though of a last batch some may hold one sample more: ranks meet
        # in every part.
        fewest = self._samples_of_step(batch) // distributed.world_size()
        parts = min(self.optimization.accumulate, max(fewest, 1))
        if parts == 1:
            return [batch]
        cuts = [len(batch) * part // parts for part in range(parts + 1)]
        return [batch.rows(slice(*ends)) for ends in itertools.pairwise(cuts)]

    def _samples_of_step(self, batch: Batch) -> int:
        """Over all ranks, of which this one has ``batch``."""
        if self.global_batch is not None:
            return self.global_batch(self.position)
        return len(batch) * distributed.world_size()

    def _measure_gradients(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> dict[str, float]:
        """Share of each weighted term in the sum of their gradient norms at what is trained."""
        norms = self._gradient_norms(terms, weights)
        total = sum(norms.values())
        return {name: norm / total if total > 0 else 0.0 for name, norm in norms.items()}

    def gradient_norms(self, batch: Batch) -> dict[str, float]:
        """Norm of each weighted term's gradient on a batch, by another pass over it."""
        progress, norms = self.progress(), dict[str, float]()
        for part in self._parts(batch):
            terms = self._terms(part, progress)
            found = self._gradient_norms(terms, self.method.weights(progress))
            norms = {name: norms.get(name, 0.0) + norm for name, norm in found.items()}
        return norms

    def _gradient_norms(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> dict[str, float]:
        parameters = [p for p in self.networks.parameters() if p.requires_grad]
        norms = {}
        for name, term in terms.items():
            gradients: tuple[Tensor | None, ...] = (None,)
            if term.requires_grad:
                gradients = torch.autograd.grad(
                    term, parameters, retain_graph=True, allow_unused=True
                )
            present = [g for g in gradients if g is not None]
            norm = torch.stack([g.norm() for g in present]).norm() if present else torch.zeros(())
            norms[name] = abs(weights.get(name, 1.0)) * float(norm)
        return norms

    # -- evaluation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start fresh metrics for the deployed student, once the method has calibrated it."""
        network = self.deployed()
        was_training = network.training
        # Each rank's running statistics are of its own samples; those of rank 0 are what is saved.
        distributed.share_buffers(network)
        self.method.calibrate(network.eval(), self._outputs_on_validation(network))
        # In a plain tuple: as attributes they would become part of this module and its checkpoints.
        self._judged = (network, self.task.metrics().to(self.device), was_training)

    @torch.no_grad()
    def _outputs_on_validation(self, network: nn.Module) -> Iterator[tuple[ModelOutput, Batch]]:
        taps = self._cast[STUDENT][1]
        limit = self.trainer.limit_val_batches  # A number of batches: see ``kdrun.fit.fit``.
        for batch in itertools.islice(self.trainer.val_dataloaders, limit):
            with self.trainer.precision_plugin.val_step_context():
                output = run_network(self.task, network, batch, taps)
            yield output, batch

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Judge one batch."""
        network, metrics, _ = self._judged
        self.task.update_metrics(metrics, self.task.forward(network, batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Reduce the metrics over ranks and leave them in ``validation``."""
        network, metrics, was_training = self._judged
        self.validation = self.task.compute(metrics)
        network.train(was_training)

    # -- state ---------------------------------------------------------------------------------

    def training_state(self) -> dict[str, Any]:
        """Everything that continues this training exactly, as plain values and tensors."""
        return {
            "state_dict": self.trainer.strategy.lightning_module_state_dict(),
            "optimizers": [self.trainer.strategy.optimizer_state(o) for o in self._optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
            "epoch": self.epoch,
            "position": self.position,
            "step_count": self.step_count,
            "sums": distributed.gather_objects(self.sums.state_dict()),
            "gradient_shares": self.gradient_shares,
            "skipped_steps": self.guard.skipped,
            "seconds_in_steps": self.seconds_in_steps,
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Continue where ``training_state`` was taken; call once the trainer is set up."""
        self.trainer.strategy.load_model_state_dict(state, strict=True)
        self.trainer.strategy.load_optimizer_state_dict({"optimizer_states": state["optimizers"]})
        for scheduler, saved in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.epoch, self.position = state["epoch"], state["position"]
        self.step_count = state["step_count"]
        sums = state["sums"]  # Of all ranks, of which another command may have fewer or more.
        self.sums.load_state_dict(sums[min(distributed.rank(), len(sums) - 1)], self.device)
        self.gradient_shares = state["gradient_shares"]
        self.guard.skipped = state["skipped_steps"]
        self.seconds_in_steps = state["seconds_in_steps"]


class StepEngine:
    """What a method with an irregular step works with (``kdrun.method.Engine``)."""

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller

    def forward(self, role: str, batch: Batch) -> ModelOutput:
        """Run the network of ``role``; gradients flow if that role is trained."""
        return self._distiller.forward(role, batch)

    def optimize(self, loss: Tensor, *roles: str) -> None:
        """Back-propagate ``loss`` and step the optimisers of ``roles`` from clean gradients."""
        distiller = self._distiller
        order = list(distiller.networks)
        for role in roles:
            if role not in order:
                raise UserError(f"{role} is frozen: it has no optimiser")
        distiller.guard.watch(loss, {f"of {' and '.join(roles)}": loss})
        distiller._backward(loss)
        distiller._update([order.index(role) for role in roles])
        # What the loss left in networks that were not asked for must not reach their next step.
        for number, role in enumerate(order):
            if role not in roles:
                distiller._optimizers[number].zero_grad(set_to_none=True)
