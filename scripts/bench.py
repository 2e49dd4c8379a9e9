"""What kdrun costs and gains: every figure of docs/performance.md.

    python scripts/bench.py <benchmark> [options]

Each benchmark is a file in ``scripts/benchmarks/`` that says what it compares and how. Figures are
ratios taken in one run, printed as minimum - median - maximum over the rounds.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.allocator import allocator_child, bench_allocator
from benchmarks.cache import bench_cache
from benchmarks.common import PAIRS
from benchmarks.data import bench_data
from benchmarks.epoch import bench_epoch
from benchmarks.members import bench_members
from benchmarks.process import bench_process
from benchmarks.reports import bench_reports
from benchmarks.startup import bench_startup
from benchmarks.step import bench_step
from benchmarks.vocabulary import bench_vocabulary, vocabulary_child


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="benchmark")

    step = commands.add_parser("step", help="a training step over that of a bare loop")
    step.add_argument("--pair", choices=PAIRS, default=None, help="all if left out")
    step.add_argument("--rounds", type=int, default=15)
    step.set_defaults(run=lambda o: [bench_step(p, o.rounds) for p in _pairs(o.pair)])

    startup = commands.add_parser("startup", help="seconds to help, an error, the first epoch")
    startup.add_argument("--runs", type=int, default=5)
    startup.set_defaults(run=lambda o: bench_startup(o.runs))

    allocator = commands.add_parser("allocator", help="what keeping freed memory gains")
    allocator.add_argument("--rounds", type=int, default=7)
    allocator.set_defaults(run=lambda o: bench_allocator(o.rounds))
    child = commands.add_parser("allocator-child")
    child.add_argument("--keep", choices=("yes", "no"), required=True)
    child.set_defaults(run=lambda o: allocator_child(o.keep == "yes"))

    data = commands.add_parser("data", help="images per second of the data path")
    data.add_argument("--rounds", type=int, default=9)
    data.set_defaults(run=lambda o: bench_data(o.rounds))

    cache = commands.add_parser("cache", help="recorded logits in place of the live teacher")
    cache.add_argument("--pair", choices=PAIRS, default="resnet20-resnet8")
    cache.add_argument("--rounds", type=int, default=15)
    cache.set_defaults(run=lambda o: bench_cache(o.pair, o.rounds))

    members = commands.add_parser("members", help="students on one teacher pass over single runs")
    members.add_argument("--pair", choices=PAIRS, default="resnet32x4-resnet8x4")
    members.add_argument("--count", type=int, default=4, help="students")
    members.add_argument("--rounds", type=int, default=7)
    members.set_defaults(run=lambda o: bench_members(o.pair, o.count, o.rounds))

    epoch = commands.add_parser("epoch", help="an epoch of CIFAR-100 over that of a plain script")
    epoch.add_argument("--pair", choices=list(PAIRS)[1:], default="resnet20-resnet8")
    epoch.add_argument("--per-class", type=int, default=320, help="training images of each class")
    epoch.add_argument("--rounds", type=int, default=5)
    epoch.add_argument("--epochs", type=int, default=1, help="of each training")
    epoch.add_argument("--teacher", help="safetensors file of a trained teacher")
    epoch.set_defaults(
        run=lambda o: bench_epoch(o.pair, o.per_class, o.rounds, o.teacher, o.epochs)
    )

    vocabulary = commands.add_parser("vocabulary", help="memory of losses over many classes")
    _vocabulary_options(vocabulary)
    vocabulary.add_argument("--no-plain", action="store_true", help="where it does not fit")
    vocabulary.set_defaults(
        run=lambda o: bench_vocabulary(o.tokens, o.classes, o.width, o.chunk, not o.no_plain)
    )
    child = commands.add_parser("vocabulary-child")
    _vocabulary_options(child)
    child.add_argument("--kind", choices=("plain", "chunked"), required=True)
    child.set_defaults(
        run=lambda o: vocabulary_child(o.kind, o.tokens, o.classes, o.width, o.chunk)
    )

    process = commands.add_parser("process", help="a whole process over that of a plain script")
    process.add_argument("--rounds", type=int, default=7)
    process.set_defaults(run=lambda o: bench_process(o.rounds))

    reports = commands.add_parser("reports", help="seconds to read and aggregate many runs")
    reports.add_argument("--runs", type=int, default=10_000)
    reports.add_argument("--rounds", type=int, default=5)
    reports.set_defaults(run=lambda o: bench_reports(o.runs, o.rounds))

    options = parser.parse_args()
    options.run(options)


def _vocabulary_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=256, help="of the hidden states")
    parser.add_argument("--chunk", type=int, default=128, help="positions at a time")


def _pairs(chosen: str | None) -> list[str]:
    return [chosen] if chosen else list(PAIRS)


if __name__ == "__main__":
    main()
