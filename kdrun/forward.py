"""Running one network on a batch: its taps are read, and every further view is run too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from kdrun.layers.taps import Taps
from kdrun.outputs import Batch, ModelOutput
from kdrun.tasks.task import Task

HALF = (torch.bfloat16, torch.float16)


def run_network(
    task: Task,
    network: nn.Module,
    batch: Batch,
    taps: Taps | None = None,
    views: Sequence[str] = (),
    joint: bool = False,
) -> ModelOutput:
    """The network's output on a batch, with tapped features and the outputs on further views.

    Unlabelled samples that come with the batch are run too, without their views.

    Args:
        task: how networks read a batch.
        network: the network.
        batch: carries the inputs of every view.
        taps: placed in the network; None: no features are read.
        views: names of the further views to run.
        joint: run labelled and unlabelled samples as one batch, so that batch normalisation sees
            them together; otherwise one after the other.
    """
    if batch.unlabelled is None:
        output = _tapped(task, network, batch, taps)
    elif joint:
        output = _tapped(task, network, _joined(batch, batch.unlabelled), taps)
        size = len(batch)
        output, output.unlabelled = output.rows(slice(size)), output.rows(slice(size, None))
    else:
        output = _tapped(task, network, batch, taps)
        output.unlabelled = _tapped(task, network, batch.unlabelled, taps)
    for name in views:
        view = replace(batch, inputs=batch.views[name], views={})
        output.views[name] = _tapped(task, network, view, taps)
    return output


def _tapped(task: Task, network: nn.Module, batch: Batch, taps: Taps | None) -> ModelOutput:
    if taps is None:
        return task.forward(network, batch)
    with taps:
        output = task.forward(network, batch)
    features = taps.collect()
    if not torch.is_autocast_enabled(batch.index.device.type):
        # A frozen network may compute in half precision where the student does not.
        features = {n: f.float() if f.dtype in HALF else f for n, f in features.items()}
    output.features.update(features)
    return output


def _joined(first: Batch, second: Batch) -> Batch:
    """The samples of both as one batch, without masks and views."""
    names = first.inputs if isinstance(first.inputs, dict) else None
    inputs = (
        torch.cat([first.inputs, second.inputs])
        if names is None
        else {name: torch.cat([first.inputs[name], second.inputs[name]]) for name in names}
    )
    index = torch.cat([first.index, second.index])
    return Batch(inputs, torch.cat([first.target, second.target]), index)
