"""A faster start: optional parts of torchmetrics that no run uses are not imported.

Importing Lightning imports torchmetrics, and importing that imports torchvision, transformers and
scipy's signal processing, for image, text and audio metrics that are not used here. Together they
take longer than torch itself.
"""

from __future__ import annotations

UNUSED = (
    *("torchvision", "transformers", "scipy", "pycocotools", "torch_fidelity", "onnxruntime"),
    *("matplotlib", "scienceplots"),
)
"""What torchmetrics is told is not installed."""


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
