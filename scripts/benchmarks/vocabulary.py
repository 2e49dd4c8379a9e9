"""Memory of a divergence over many classes: all logits at once, and a few positions at a time.

Each measurement is a process of its own: what the loss, its backward pass and the gradients of the
hidden states and of the last layer add to the process at their peak.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional


def bench_vocabulary(tokens: int, classes: int, width: int, chunk: int, plain: bool) -> None:
    """Print peak MiB and seconds, and the ratio of the memories where both are measured."""
    found = {}
    for kind in ("plain", "chunked") if plain else ("chunked",):
        command = [sys.executable, sys.argv[0], "vocabulary-child", "--kind", kind]
        for name, value in (("tokens", tokens), ("classes", classes), ("width", width)):
            command += [f"--{name}", str(value)]
        done = subprocess.run(
            [*command, "--chunk", str(chunk)], check=True, capture_output=True, text=True
        )
        found[kind] = [float(word) for word in done.stdout.split()]
        peak, seconds, loss = found[kind]
        print(
            f"{kind:<8} {tokens:,} tokens x {classes:,} classes: {peak:,.0f} MiB, "
            f"{seconds:.1f} s, loss {loss:.6f}"
        )
    if plain:
        print(f"chunked / plain memory: {found['chunked'][0] / found['plain'][0]:.3f}")


def vocabulary_child(kind: str, tokens: int, classes: int, width: int, chunk: int) -> None:
    """Measure one kind in this process."""
    from kdrun.losses.chunked import mean_over_positions
    from kdrun.losses.distributions import forward_kl
    from kdrun.outputs import HeadLogits

    def per_position(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        return forward_kl(log_q, log_p).unsqueeze(-1)

    def loss_of(positions: int) -> torch.Tensor:
        heads = [HeadLogits(hidden[:positions], weight, None, chunk) for hidden, weight in networks]
        if kind == "chunked":
            return mean_over_positions(per_position, *heads)[0]
        logits = [functional.linear(head.hidden, head.weight) for head in heads]
        return mean_over_positions(per_position, *logits)[0]

    torch.manual_seed(0)
    networks = [(torch.randn(tokens, width), torch.randn(classes, width) / 16) for _ in range(2)]
    for tensor in networks[0]:
        tensor.requires_grad_()
    loss_of(1).backward()  # What is allocated once and for all.
    for tensor in networks[0]:
        tensor.grad = None
    before = _resident_mib()
    began = time.perf_counter()
    loss = loss_of(tokens)
    loss.backward()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(peak - before, seconds, float(loss))


def _resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
