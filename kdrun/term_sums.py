"""Sums of loss terms over a step and over an epoch, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdrun import distributed
from kdrun.losses.distributed import sum_over_ranks
from kdrun.outputs import Batch


def shares_of_step(parts: Sequence[Batch], samples: int) -> list[float] | list[Tensor]:
    """Weight of each part's mean in the gradient of a step, which is averaged over ranks.

    A part weighs as many samples as it has; where positions are masked, as many as count of these,
    which only the device knows: these weights stay there.

    Args:
        parts: of this rank.
        samples: of the step, over all ranks.
    """
    ranks = distributed.world_size()
    if len(parts) == ranks == 1:
        return [1.0]
    if parts[0].mask is None:
        return [len(part) * ranks / samples for part in parts]
    counts = torch.stack([part.mask.sum() for part in parts])
    return list(counts * ranks / sum_over_ranks(counts.sum()).clamp(min=1))


class TermSums:
    """Running sums of loss terms on the device; reading them is the only synchronisation.

    The cost of a step is one fused addition. Weighted sums follow from the plain ones, and are
    brought up to date only where a weight changes.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.count: float | Tensor = 0.0
        self._weights: tuple[float, ...] = ()
        self._plain: list[Tensor] = []
        self._weighted: list[Tensor] = []
        self._since_change: list[Tensor] = []
        self._recorded: dict[str, Tensor] = {}

    def add(
        self,
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float],
        recorded: Mapping[str, Tensor],
        share: float | Tensor = 1.0,
        counted: bool = True,
    ) -> Tensor:
        """Add one step's terms; returns the weighted sum, with its graph, times ``share``.

        Args:
            terms: scalars by name.
            weights: factors of some of them.
            recorded: further scalars, which are no terms.
            share: of the step, where it comes in parts; a scalar on the device if only that knows.
            counted: whether the sums change.
        """
        names = tuple(terms)
        if names != self.names:
            self._begin(terms, weights)
        factors = tuple(weights.get(name, 1.0) for name in names)
        values = list(terms.values())
        if counted:
            with torch.no_grad():
                if factors != self._weights:
                    self._settle(factors)
                if isinstance(share, Tensor):
                    torch._foreach_add_(self._since_change, torch._foreach_mul(values, share))
                else:
                    torch._foreach_add_(self._since_change, values, alpha=share)
                for name, value in recorded.items():
                    value = value * share
                    known = self._recorded.get(name)
                    self._recorded[name] = value if known is None else known + value
            self.count = self.count + share
        scaled = [v if f == 1.0 else v * f for v, f in zip(values, factors, strict=True)]
        total = scaled[0]
        for term in scaled[1:]:
            total = total + term
        whole = not isinstance(share, Tensor) and share == 1.0
        return total if whole else total * share

    def _begin(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        if self.names:
            raise ValueError(
                f"loss terms changed from {self.names} to {tuple(terms)} within an epoch"
            )
        unknown = set(weights) - set(terms)
        if unknown:
            raise ValueError(f"weights for terms that do not exist: {sorted(unknown)}")
        if not terms:
            raise ValueError("a method must return at least one loss term")
        self.names = tuple(terms)
        zeros = [torch.zeros_like(term, requires_grad=False) for term in terms.values()]
        self._plain, self._weighted = zeros, [zero.clone() for zero in zeros]
        self._since_change = [zero.clone() for zero in zeros]

    def _settle(self, factors: tuple[float, ...] = ()) -> None:
        """Credit what was added under the present weights, then go on with ``factors``."""
        if self._weights:
            torch._foreach_add_(self._plain, self._since_change)
            for total, part, factor in zip(
                self._weighted, self._since_change, self._weights, strict=True
            ):
                total.add_(part, alpha=factor)
            torch._foreach_zero_(self._since_change)
        self._weights = factors or self._weights

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """Means over all ranks since the last reset; synchronises with the device.

        ``loss``, ``loss/<term>``, ``weighted/<term>``, and what the method recorded.
        """
        if not self.names:
            return {}
        self._settle()
        sums = torch.stack([*self._plain, *self._weighted]).float()
        recorded, count = self._recorded, float(self.count)
        if distributed.world_size() > 1:
            parts = distributed.gather_objects((sums.cpu(), recorded, count))
            sums = torch.stack([part[0] for part in parts]).sum(0)
            recorded = {name: sum(part[1][name].cpu() for part in parts) for name in recorded}
            count = sum(part[2] for part in parts)
        if not count:
            return {}
        means = (sums / count).tolist()
        plain, weighted = means[: len(self.names)], means[len(self.names) :]
        found = {"loss": sum(weighted)}
        found |= {f"loss/{name}": mean for name, mean in zip(self.names, plain, strict=True)}
        found |= {f"weighted/{name}": m for name, m in zip(self.names, weighted, strict=True)}
        return found | {name: float(value) / count for name, value in recorded.items()}

    def reset(self) -> None:
        """Forget the sums."""
        self.count, self.names, self._weights, self._recorded = 0.0, (), (), {}
        self._plain, self._weighted, self._since_change = [], [], []

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The sums as plain values and tensors.

        They stay as they are: bringing the weighted ones up to date would round differently from
        then on, and a training would show in its last digits where it was saved.
        """
        return {
            "names": list(self.names),
            "count": float(self.count),
            "weights": list(self._weights),
            "plain": [value.clone() for value in self._plain],
            "weighted": [value.clone() for value in self._weighted],
            "since_change": [value.clone() for value in self._since_change],
            "recorded": dict(self._recorded),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from saved sums."""
        self.names, self.count = tuple(state["names"]), state["count"]
        self._weights = tuple(state["weights"])
        self._plain = [value.to(device) for value in state["plain"]]
        self._weighted = [value.to(device) for value in state["weighted"]]
        self._since_change = [value.to(device) for value in state["since_change"]]
        self._recorded = {name: value.to(device) for name, value in state["recorded"].items()}
