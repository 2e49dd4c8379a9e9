"""``kdrun doctor``: does this installation fit together, and what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.browse import columns
from kdrun.cores import usable_cores

if TYPE_CHECKING:
    from packaging.requirements import Requirement

CHECKED = (
    "kdrun",
    "torchvision",
    "torchaudio",
    "lightning",
    "timm",
    "transformers",
    "torchmetrics",
)
"""Distributions whose own requirements must be met by what is installed."""

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "MLFLOW_TRACKING_TOKEN")
"""Environment variables that are only ever reported as set or not."""

SETTINGS = ("KDRUN_DATA", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass
class Report:
    """What was found.

    Attributes:
        sections: rows of text by title.
        problems: one line each, with what to do.
    """

    sections: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole report, problems last."""
        parts = [f"{title}\n{columns(rows, indent='  ')}" for title, rows in self.sections.items()]
        lines = [f"  {problem}" for problem in self.problems] or ["  none"]
        return "\n\n".join([*parts, "\n".join(["Problems", *lines])])


def examine() -> Report:
    """Look at packages, hardware, folders and settings."""
    report = Report()
    report.sections["System"] = [
        ("python", sys.version.split()[0], sys.executable),
        ("platform", platform.platform()),
        ("cores", str(usable_cores())),
    ]
    _packages(report)
    _extras(report)
    _hardware(report)
    _folders(report)
    report.sections["Environment"] = [
        *((name, os.environ.get(name, "unset")) for name in SETTINGS),
        *((name, "set (not shown)" if os.environ.get(name) else "unset") for name in SECRETS),
    ]
    return report


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(name: str) -> list[Requirement]:
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Requirement(line) for line in lines]


def _packages(report: Report) -> None:
    rows: list[tuple[str, ...]] = [("kdrun", _version("kdrun") or "not installed")]
    for requirement in _requirements("kdrun"):
        if requirement.marker is None:
            rows.append((requirement.name, _version(requirement.name) or "missing"))
    report.sections["Packages"] = rows
    for name in CHECKED:
        for requirement in _requirements(name):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = _version(requirement.name)
            wanted = f"{requirement.name}{requirement.specifier}"
            if found is None:
                report.problems.append(f"{name} needs {wanted}: pip install '{wanted}'")
            elif not requirement.specifier.contains(found, prereleases=True):
                report.problems.append(
                    f"{name} {_version(name)} needs {wanted}, {found} is installed: "
                    f"pip install '{wanted}', or another {name}"
                )


def _extras(report: Report) -> None:
    missing: dict[str, list[str]] = {}
    for requirement in _requirements("kdrun"):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            continue
        for extra in importlib.metadata.metadata("kdrun").get_all("Provides-Extra") or []:
            if requirement.marker.evaluate({"extra": extra}):
                missing.setdefault(extra, [])
                if _version(requirement.name) is None:
                    missing[extra].append(requirement.name)
    report.sections["Extras"] = [
        (extra, f"pip install 'kdrun[{extra}]'" if names else "installed")
        for extra, names in missing.items()
    ]


def _hardware(report: Report) -> None:
    import torch

    rows: list[tuple[str, ...]] = [("torch threads", str(torch.get_num_threads()))]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(number).total_memory / 2**30
            rows.append((f"GPU {number}", torch.cuda.get_device_name(number), f"{memory:.0f} GiB"))
        rows.append(("CUDA", str(torch.version.cuda)))
    else:
        rows.append(("GPU", "none that torch can use"))
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            report.problems.append(
                "this machine has an NVIDIA driver but torch is built for the CPU: "
                "install torch as https://pytorch.org/get-started says"
            )
    report.sections["Hardware"] = rows


def _folders(report: Report) -> None:
    outputs = Path("outputs").resolve()
    place = outputs if outputs.exists() else outputs.parent
    free = shutil.disk_usage(place).free / 2**30
    report.sections["Folders"] = [("outputs", str(outputs), f"{free:.0f} GiB free")]
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        report.problems.append(
            f"cannot write in {place} ({error.strerror}): run kdrun elsewhere or set output_dir="
        )
    if free < 1:
        report.problems.append(f"less than 1 GiB is free at {place}")
    data = os.environ.get("KDRUN_DATA")
    if data and not Path(data).is_dir():
        report.problems.append(f"KDRUN_DATA={data} is no folder")
