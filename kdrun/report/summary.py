"""The closing table of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrun.clock import clock
from kdrun.report.alignment import aligned

COLUMNS = ("", "network", "parameters", "test", "ece", "agreement", "kl", "trained in")


def summary_table(result: Mapping[str, Any]) -> str:
    """Teacher, student alone and distilled, after the last and the best epoch, as aligned text.

    Args:
        result: the content of ``result.json``.
    """
    if not result["networks"]:
        return "\nno stage of this recipe evaluates the networks"
    protocol = {
        "holdout": "best = best epoch on the held-out validation split; test evaluated once",
        "paper": "protocol=paper: best = best epoch on the test set, as many papers report it",
    }[result["protocol"]]
    table = networks_table(result["metric"], result["networks"])
    rounds = "".join(
        f"\n{line}" for line in round_lines(result["metric"], result.get("rounds", []))
    )
    return f"\n{table}\n({protocol}){rounds}"


def round_lines(metric: str, rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each round of a run that buys labels: how many it had, and what they gave.

    Args:
        metric: the task's main metric.
        rounds: as in ``result.json``.
    """
    return [
        f"round {number}: {entry['labelled']:,} labels, test {metric} "
        f"{_number(entry['networks']['distilled']['test_last'].get(metric), 2)}"
        for number, entry in enumerate(rounds)
    ]


def networks_table(metric: str, networks: Mapping[str, Any]) -> str:
    """One line for each network and weights of it.

    Args:
        metric: the task's main metric.
        networks: by role, as in ``result.json``.
    """
    rows = [list(COLUMNS)]
    rows[0][3] = f"test {metric}"
    for role, entry in networks.items():
        training = entry.get("training", {})
        seconds = training.get("seconds")
        for label, key in (("", "test"), (" (last)", "test_last"), (" (best)", "test_best")):
            if key not in entry:
                continue
            values = entry[key]
            first = key != "test_best"
            rows.append(
                [
                    role + label,
                    entry["network"] if first else "",
                    f"{entry['parameters']:,}" if first else "",
                    _number(values.get(metric), 2),
                    _number(values.get("ece"), 2),
                    _number(values.get("agreement"), 2),
                    _number(values.get("kl"), 4),
                    clock(seconds) if seconds and first else "",
                ]
            )
    return aligned(rows, left=2)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
