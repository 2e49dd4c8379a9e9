"""SeqKD: sequence-level knowledge distillation (Kim, Rush; EMNLP 2016).

The student is trained on text that the teacher wrote (arXiv 1606.07947, section 3.2), which stands
in for the teacher's distribution over whole sequences:

    L = CE(z_s, y),    y sampled from the teacher

The stage ``generated`` of the recipe has the teacher continue the prompt of every training row,
once, into the store; the rows take the place of the training split. The paper searches with a beam;
this, like MiniLLM and DistiLLM, draws samples, at ``recipe.stages.generated.temperature``. In the
steps the teacher is not run. Validation and test stay the data set's own text.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress


class SeqKD(Method):
    """Train on the teacher's text."""

    tasks = ("language_modelling",)
    offline = True
    lazy_logits = True

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The supervised loss, on the teacher's text."""
        return {"sequence": self.supervised_loss(student, batch)}
