"""What a method trained beside the student and does not ship, with its final weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdrun.assembly import STUDENT, Assembly
from kdrun.stages.stage import Context
from kdrun.training_state import CHECKPOINT


def trained_companions(context: Context, assembly: Assembly) -> dict[str, nn.Module]:
    """The method's companions of the student as they are after the last epoch, by name.

    What a method learns has no average, so these go with the student itself, not with its average.
    They come from the last checkpoint of the training, the only file that holds what a method has
    learned. Where there are any, the student and the method of ``assembly`` get its weights too.
    """
    companions = assembly.method.companions(assembly.student)
    if companions:
        path = context.artefacts["distil"].path(CHECKPOINT)
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        assembly.student.load_state_dict(_below(f"networks.{STUDENT}.", state))
        assembly.method.load_state_dict(_below("method.", state))
    return companions


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
