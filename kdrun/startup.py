"""A faster start and end: nothing is imported or looked through that no run needs.

Importing Lightning imports torchmetrics, and importing that imports torchvision, transformers and
scipy's signal processing, for image, text and audio metrics that are not used here. Together they
take longer than torch itself.

Python's collector of reference cycles looks through the objects of a process now and then, and at
its end; importing torch and Lightning makes half a million that live as long as it does. So it is
off while they are imported, and passes over those that are there when the first run begins.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

UNUSED = (
    *("torchvision", "transformers", "scipy", "pycocotools", "torch_fidelity", "onnxruntime"),
    *("matplotlib", "scienceplots"),
)
"""What torchmetrics is told is not installed."""


def start_computing() -> None:
    """What a command does before it imports anything that imports torch."""
    import_torchmetrics()
    collect_garbage()


def import_torchmetrics() -> None:
    """Import torchmetrics without its optional dependencies, before anything else does.

    Its classification and aggregation metrics need none of them. The packages themselves stay as
    importable as ever; only metrics that wrap them are missing from this process.
    """
    from lightning_utilities.core import imports

    cache, asked, package_available = (
        imports.RequirementCache,
        imports.RequirementCache.__bool__,
        imports.package_available,
    )

    def is_available(requirement: imports.RequirementCache) -> bool:
        name = str(requirement.requirement or requirement.module or "")
        return not name.startswith(UNUSED) and asked(requirement)

    cache.__bool__ = is_available
    imports.package_available = lambda name: name not in UNUSED and package_available(name)
    try:
        import torchmetrics  # noqa: F401
    finally:
        cache.__bool__ = asked
        imports.package_available = package_available


def collect_garbage() -> None:
    """Turn Python's collector on for what is made from here on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's collector from running meanwhile, where it was on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
