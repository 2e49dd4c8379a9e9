"""Reading and aggregating many runs: seconds of ``kdrun report`` on ten thousand of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import spread

SEEDS = 5


def bench_reports(runs: int, rounds: int) -> None:
    """Time the whole command on made-up runs, whose ``result.json`` is as long as a real one's."""
    program = str(Path(sys.executable).with_name("kdrun"))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        for number in range(runs // SEEDS):
            for seed in range(SEEDS):
                _write(Path(folder), number, seed)
        size = len(next(Path(folder).rglob("result.json")).read_bytes())
        print(f"{runs} runs of {size} bytes written in {time.perf_counter() - began:.1f} s")
        for words in (["format=text"], ["format=json"], ["analysis=paired"]):
            seconds = []
            for _ in range(rounds):
                began = time.perf_counter()
                command = [program, "report", folder, "baseline=m0", *words]
                done = subprocess.run(command, capture_output=True, check=True)
                seconds.append(time.perf_counter() - began)
            lines = done.stdout.count(b"\n")
            print(f"report {words[0]}: {spread(seconds)} s, {lines:,} lines")


def _write(root: Path, number: int, seed: int) -> None:
    """The result of a run: method ``number`` on one of four pairs of networks."""
    pair, method = f"teacher{number % 4}-student{number % 4}", f"m{number // 4}"
    directory = root / "digits" / pair / f"{method}-{number:08x}" / f"seed{seed}"
    directory.mkdir(parents=True)
    accuracy = 80 + 10 * ((number * 7919 + seed * 104729) % 1000) / 1000
    metrics = {"accuracy": accuracy, "accuracy_top5": 99.0, "loss": 0.4321987654, "ece": 3.21098}
    metrics |= {"kl": 0.2345678912, "agreement": 91.2345678}
    training = {
        "epochs": 8,
        "best_epoch": 7,
        "seconds": 12.345678,
        "samples_per_second": 1234.5678,
        "validation": {"last": metrics, "best": metrics},
        "gradient_shares": {"supervised": 0.5, "kd": 0.5},
    }

    def network(name: str, *ends: str) -> dict[str, object]:
        facts = {"network": name, "parameters": 272_186, "training": training}
        return facts | {f"test{end}": metrics for end in ends}

    names = {"method": method, "dataset": "digits", "task": "classification", "training": "digits"}
    names |= {"teacher": pair.split("-")[0], "student": pair.split("-")[1], "recipe": "default"}
    result = {
        "schema": 1,
        "names": names,
        "seed": seed,
        "protocol": "holdout",
        "metric": "accuracy",
        "direction": "max",
        "command": f"kdrun method={method} seed={seed}",
        "directory": str(directory),
        "data": "0" * 64,
        "artefacts": {"teacher": f"network/{number % 4}", "alone": f"network/{number % 4}-{seed}"},
        "seconds": 30.0,
        "networks": {
            "teacher": network(names["teacher"], ""),
            "alone": network(names["student"], "_last", "_best"),
            "distilled": network(names["student"], "_last", "_best"),
        },
        "objective": accuracy,
    }
    (directory / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
