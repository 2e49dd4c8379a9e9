"""Judging networks: the task's metrics, and how far each agrees with a reference network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from kdrun.data.loader import Loader
from kdrun.files import write_atomically
from kdrun.outputs import Batch, ModelOutput
from kdrun.tasks.task import Task

if TYPE_CHECKING:
    from kdrun.stages.stage import Context


class Fidelity:
    """Agreement of a network with a reference: ``kl`` in nats and top-1 ``agreement`` in percent.

    ``kl`` is KL(reference || network) at temperature 1, mean over the positions that count.
    """

    def __init__(self, device: torch.device) -> None:
        self._kl = MeanMetric().to(device)
        self._agreement = MeanMetric().to(device)

    def update(self, output: ModelOutput, reference: ModelOutput, batch: Batch) -> None:
        """Add one batch; both outputs have logits ``(B, ..., C)``."""
        log_p = reference.dense_logits.float().log_softmax(-1)
        log_q = output.dense_logits.float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        weight = torch.ones_like(kl) if batch.mask is None else batch.mask.to(kl.dtype)
        self._kl.update(kl, weight)
        self._agreement.update(same, weight)

    def compute(self) -> dict[str, float]:
        """The two means."""
        return {
            "kl": float(self._kl.compute()),
            "agreement": 100.0 * float(self._agreement.compute()),
        }


class Predictions:
    """What each network says of every sample, where the task has one prediction per sample."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def update(self, outputs: Mapping[str, ModelOutput], batch: Batch, task: Task) -> None:
        """Add the samples that count of one batch: outputs by the network's name."""
        said = {name: task.predictions(output) for name, output in outputs.items()}
        if None in said.values():
            return
        counted = slice(None) if batch.mask is None else batch.mask.cpu()
        self._keep("index", batch.index, counted)
        self._keep("target", batch.target, counted)
        for name, values in said.items():
            for what, value in values.items():
                self._keep(f"{name}/{what}", value, counted)

    def save(self, path: Path) -> None:
        """Write them as safetensors, a row per sample in the order of the split; nothing where the
        task has none."""
        if self._parts:
            rows = {name: torch.cat(parts) for name, parts in self._parts.items()}
            write_atomically(path, safetensors.torch.save(rows))

    def _keep(self, name: str, value: Tensor, counted: Tensor | slice) -> None:
        value = value.cpu()[counted]
        self._parts.setdefault(name, []).append(value if value.is_floating_point() else value.int())


@torch.no_grad()
def evaluate(
    networks: Mapping[str, nn.Module],
    context: Context,
    split: Callable[..., Loader],
    reference: str | None = None,
    predictions: Predictions | None = None,
) -> dict[str, dict[str, float]]:
    """Run several networks over one split, in one pass over the data.

    Every rank of a distributed run sees the whole split, so results need no reduction.

    Args:
        networks: networks by name; put into evaluation mode.
        context: the run, for the task and the device.
        split: ``context.data.validation`` or ``context.data.test``.
        reference: name of the network that the others' fidelity is measured against.
        predictions: where to keep what the networks say of each sample; None: nowhere.

    Returns:
        Metrics by network: the task's, and ``kl`` and ``agreement`` where there is a reference.
    """
    device = evaluation_device(context.config["trainer"]["accelerator"])
    batch_size = context.data.evaluation_batch_size(context.config["training"]["batch_size"])
    metrics, fidelity = {}, {}
    for name, network in networks.items():
        network.to(device).eval()
        metrics[name] = context.task.metrics().to(device)
        for metric in metrics[name].values():
            metric.distributed_available_fn = _alone
        if reference is not None and name != reference:
            fidelity[name] = Fidelity(device)
    for number, batch in enumerate(split(batch_size=batch_size, device=device)):
        if context.limit_batches is not None and number == context.limit_batches:
            break
        outputs = {name: context.task.forward(network, batch) for name, network in networks.items()}
        if predictions is not None:
            predictions.update(outputs, batch, context.task)
        for name, output in outputs.items():
            context.task.update_metrics(metrics[name], output, batch)
            if name in fidelity:
                fidelity[name].update(output, outputs[reference], batch)
    results = {}
    for name, network in networks.items():
        network.cpu()
        results[name] = context.task.compute(metrics[name])
        if name in fidelity:
            results[name] |= fidelity[name].compute()
    return results


def evaluation_device(accelerator: str) -> torch.device:
    """The device of the ``trainer.accelerator`` option in this process."""
    if accelerator in ("gpu", "auto") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if accelerator in ("mps", "auto") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def parameter_count(network: nn.Module) -> int:
    """Number of parameters, trained or not."""
    return sum(parameter.numel() for parameter in network.parameters())


def _alone() -> bool:
    return False
