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
) -> ModelOutput:
    """The network's output on a batch, with tapped features and the outputs on further views.

    Args:
        task: how networks read a batch.
        network: the network.
        batch: carries the inputs of every view.
        taps: placed in the network; None: no features are read.
        views: names of the further views to run.
    """
    output = _tapped(task, network, batch, taps)
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
