"""What a reviewer needs to rerun a run: versions, source state, hardware."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kdrun.cores import usable_cores

PACKAGES = (
    "kdrun",
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "timm",
    "transformers",
    "datasets",
    "scikit-learn",
    "numpy",
)
LARGEST_DIFF = 1_000_000
"""Characters of an uncommitted difference that are kept."""


def environment() -> dict[str, Any]:
    """Versions, git commit and uncommitted difference, processor, GPU, threads, and the time."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "packages": versions(),
        "git": source_state(Path(__file__).parent),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_state(directory: Path) -> dict[str, str] | None:
    """Commit and uncommitted difference of the checkout around ``directory``; None outside one."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    difference = _git(directory, "diff", "HEAD") or ""
    return {"commit": commit.strip(), "diff": difference[:LARGEST_DIFF]}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
