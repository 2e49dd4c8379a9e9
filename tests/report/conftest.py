from __future__ import annotations

import json
import shlex
from pathlib import Path

from kdrun.report.runs import Run, read_run


def write_run(
    output_dir: Path,
    method: str = "kd",
    seed: int = 0,
    accuracy: float = 90.0,
    words: str = "",
    pair: tuple[str, str] = ("resnet20", "resnet8"),
    key: str = "00000000",
    teacher: str = "network/t",
    alone: str | None = None,
    protocol: str = "holdout",
) -> Run:
    """A finished run as a report reads it."""
    names = {"method": method, "dataset": "digits", "teacher": pair[0], "student": pair[1]}
    directory = output_dir / "digits" / "-".join(pair) / f"{method}-{key}" / f"seed{seed}"
    directory.mkdir(parents=True)

    def network(value: float, seconds: float, ends: tuple[str, ...]) -> dict:
        values = {"accuracy": value, "loss": 1 - value / 100, "ece": 5.0}
        if ends != ("",):
            values |= {"kl": 0.25, "agreement": 80.0}
        facts = {"parameters": 1000, "training": {"seconds": seconds}}
        return {f"test{end}": values for end in ends} | facts

    result = {
        "schema": 1,
        "names": names,
        "seed": seed,
        "protocol": protocol,
        "metric": "accuracy",
        "direction": "max",
        "command": shlex.join(["kdrun", f"method={method}", *words.split(), f"seed={seed}"]),
        "artefacts": {"teacher": teacher, "alone": alone or f"network/a{seed}"},
        "seconds": 12.0,
        "networks": {
            "teacher": network(95.0, 30.0, ("",)),
            "alone": network(88.0 + seed, 10.0, ("_last", "_best")),
            "distilled": network(accuracy, 20.0 + seed, ("_last", "_best")),
        },
        "objective": accuracy,
    }
    result["networks"]["distilled"]["test_best"] = {"accuracy": accuracy + 1, "loss": 0.1}
    (directory / "result.json").write_text(json.dumps(result))
    return read_run(directory)
