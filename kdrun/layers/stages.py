"""Stage features of two networks, stage by stage."""

from __future__ import annotations

import re

from torch import Tensor

from kdrun.outputs import ModelOutput


def stage_features(output: ModelOutput, suffix: str = "") -> list[Tensor]:
    """The tapped stage features, shallow to deep.

    Args:
        output: of a network with the taps ``stages`` or ``stages<suffix>``.
        suffix: which form of the stages, such as ``.preactivation``.

    Raises:
        ValueError: no stage was tapped.
    """
    pattern = re.compile(rf"stage(\d+){re.escape(suffix)}")
    found = {int(match[1]): name for name in output.features if (match := pattern.fullmatch(name))}
    if not found:
        raise ValueError(f"no stage features{suffix}; tapped were: {', '.join(output.features)}")
    return [output.features[found[number]] for number in sorted(found)]


def paired_stages(
    student: ModelOutput, teacher: ModelOutput, suffix: str = ""
) -> list[tuple[Tensor, Tensor]]:
    """Stage features of student and teacher in pairs, shallow to deep.

    Pairs are formed from the deepest stage upwards; where one network has more stages, its
    shallowest ones have no partner and are left out.
    """
    ours = stage_features(student, suffix)
    theirs = stage_features(teacher, suffix)
    depth = min(len(ours), len(theirs))
    return list(zip(ours[-depth:], theirs[-depth:], strict=True))


def require_maps(*features: Tensor) -> None:
    """Refuse features that are no maps ``(B, C, H, W)``.

    Raises:
        ValueError: naming the shape.
    """
    for feature in features:
        if feature.ndim != 4:
            raise ValueError(f"it compares feature maps (B, C, H, W), got {tuple(feature.shape)}")
