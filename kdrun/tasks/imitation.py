"""How near specialised teachers are to the network that they approach."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from kdrun.losses.divergence import kl_divergence
from kdrun.outputs import Batch, ModelOutput
from kdrun.tasks.task import Task


class Imitation(Task):
    """Judges a ``Panel`` of specialised teachers by their divergence from its target.

    Metrics, on logits, in nats with the factor T^2: ``kl`` is the sum over the teachers of the mean
    over the teacher's specialists of ``KL(target || specialist)``; ``kl_<specialist>`` is one of
    these divergences, ``plain_kl_<specialist>`` that of the same teacher without its mask, and
    ``spread_<specialist>`` the standard deviation of the mask over channels, mean over samples.

    Args:
        task: what the networks themselves are for; networks that are no panel run as it says.
        teachers: the specialists of each teacher by name.
        temperature: T.
    """

    name: ClassVar[str] = "imitation"
    objective: ClassVar[str] = "kl"
    direction: ClassVar[Literal["max", "min"]] = "min"

    def __init__(self, *, task: Task, teachers: dict[str, list[str]], temperature: float) -> None:
        self.task = task
        self.teachers = teachers
        self.temperature = temperature

    def forward(self, network: nn.Module, batch: Batch) -> ModelOutput:
        """As the networks' own task."""
        return self.task.forward(network, batch)

    def supervised_loss(self, output: ModelOutput, batch: Batch) -> Tensor:
        """That of the networks' own task."""
        return self.task.supervised_loss(output, batch)

    def metrics(self) -> MetricCollection:
        """Means of what is measured of each specialist."""
        names = [name for specialists in self.teachers.values() for name in specialists]
        measured = ("kl", "plain_kl", "spread")
        return MetricCollection(
            {f"{what}_{name}": MeanMetric() for what in measured for name in names},
            compute_groups=False,
        )

    def update_metrics(self, metrics: MetricCollection, output: ModelOutput, batch: Batch) -> None:
        """Add a batch of a panel's output."""
        for prefix, kind in (("kl", "masked"), ("plain_kl", "plain")):
            for name, logits in output.extra[kind].items():
                divergence = kl_divergence(
                    logits, output.logits, temperature=self.temperature, t_squared=True
                )
                metrics[f"{prefix}_{name}"].update(divergence, len(batch))
        for name, spread in output.extra["spread"].items():
            metrics[f"spread_{name}"].update(spread)

    def compute(self, metrics: MetricCollection) -> dict[str, float]:
        """The values by name."""
        values = {name: float(value) for name, value in metrics.compute().items()}
        of_teachers = [
            sum(values[f"kl_{name}"] for name in names) / len(names)
            for names in self.teachers.values()
        ]
        return {"kl": sum(of_teachers)} | values
