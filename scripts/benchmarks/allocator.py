"""What keeping freed memory gains (``kdrun.process.keep_freed_memory``).

Pairs of processes run the bare resnet20 -> resnet8 loop with and without it, in alternating order.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import BATCH, CLASSES, BareLoop, network_node, spread

BENCH = Path(__file__).parents[1] / "bench.py"


def bench_allocator(rounds: int) -> None:
    """CPU time and page faults of the bare loop, with the allocator's setting over without."""
    ratios, faults = [], {"yes": [], "no": []}
    for number in range(rounds):
        order = ("yes", "no") if number % 2 else ("no", "yes")
        seconds = {}
        for keep in order:
            command = [sys.executable, str(BENCH), "allocator-child", "--keep", keep]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            used, faulted = done.stdout.split()
            seconds[keep] = float(used)
            faults[keep].append(int(faulted))
        ratios.append(seconds["yes"] / seconds["no"])
    print(f"resnet20 -> resnet8, CPU time with / without: {spread(ratios)} ({rounds} pairs)")
    for keep, counts in faults.items():
        print(f"  page faults per step, kept={keep}: {spread([count / 1.0 for count in counts])}")


def allocator_child(keep: bool, steps: int = 12) -> None:
    """One process of ``bench_allocator``: prints CPU seconds and page faults per step."""
    from kdrun.models import build_model
    from kdrun.process import keep_freed_memory

    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    networks = [
        build_model(network_node(name), num_classes=CLASSES, input_shape=(3, 32, 32))
        for name in ("resnet20", "resnet8")
    ]
    loop = BareLoop(*networks)
    data = [(torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,)))]
    loop.run(data * 3)
    began, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loop.run(data * steps)
    used = time.process_time() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(used, faults // steps)
