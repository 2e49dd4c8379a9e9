"""MST-Distill: mixture of specialized teachers across modalities (Li et al., ACM Multimedia 2025).

Paired data, a student that will see one modality only, and two possible teachers: one that reads
both modalities, one that reads the modality the student lacks (the auxiliary teacher). Which one
helps differs by data set and by sample, and both attend to evidence that the student cannot see
(arXiv 2507.07015; details from the authors' code, github.com/Gray-OREO/MST-Distill). Three phases:

1. Co-training. With ``KL(p <- q) = T^2 KL(softmax(q / T) || softmax(p / T))``, logits ``(B, C)``,

       L = sum over networks n of CE(z_n, y) + sum over m != n of KL(z_n <- z_m)

   for teacher, auxiliary teacher and student at once. Nothing is detached: each network receives
   the gradient of four divergences.
2. Specialisation. All three are frozen. For each teacher and each of its last layers a small
   network masks that layer's channels (``kdrun.layers.masks``). Each mask is trained by itself,
   with its own optimiser, to bring the masked teacher to the student:
   ``KL(z_masked <- z_student)``.
3. Routed distillation. With N specialised teachers z_j, a gate ``g = softmax(G(s))`` that reads the
   student's logits s, and the k most probable teachers of each sample,

       L = supervised_weight CE(s, y) + kl_weight mean over the k of KL(s <- z_j)
           + balance_weight balance(g)

   The weights of the last two terms decay by steps. The gate enters the divergence through the
   choice alone, so only ``balance`` trains it; through s it reaches the student too.

Where the released code departs from the paper: in phase 3 it takes the masks of a teacher out only
after the whole batch, so the second specialised teacher has both masks although the second was
trained alone (``compat_cumulative_masks``; off: one mask each, as described). It also holds,
unused, a gate that mixes the teachers' logits and is trained by the divergence
(``routing: soft``). Its form for dense predictions, with a gate of convolutions, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrun.layers.masks import SpecialisedTeacher, accumulated, deepest_layers, specialised
from kdrun.losses.divergence import kl_divergence
from kdrun.losses.routing import (
    balance_divergence,
    balance_variation,
    mixed_divergence,
    routed_divergence,
    shares,
)
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import NonNegative, Positive, PositiveInt

STUDENT, TARGET = "student", "target"
TEACHERS = {"teacher": "teacher", "aux_teacher": "aux_teacher"}
"""Roles of the networks beside the student, and their config entries."""

SUPERVISED, KD, BALANCE = "supervised", "kd", "balance"


class MST(Method):
    """Phase 3, and the options of all phases.

    The balance of the gate is that of the batch a rank sees.

    Args:
        temperature: T of every divergence, in all phases.
        layers: the last stages of a teacher that get a mask each, before their rectifier.
        teacher_layers: locations in the teacher instead (a sub-module's path, or
            ``input:<path>``); empty: none; null: as ``layers`` says.
        aux_layers: the same in the auxiliary teacher.
        masks: without, the two teachers as they are take the place of the specialised ones.
        mask_heads: attention heads of a mask network.
        mask_reduction: width of the masked layer over the width of a mask network's tokens.
        routing: ``topk``: each sample learns from its k most probable teachers; ``soft``: from the
            mean of all teachers' logits by the gate.
        k: teachers of a sample.
        lb_mode: balance of the gate: ``KL`` of its mean from uniform over N, or ``CV``, the
            coefficient of variation of its sums.
        supervised_weight: factor of the task's own loss.
        kl_weight: factor of the divergence at the start.
        balance_weight: factor of the balance at the start.
        kl_decay: factor on ``kl_weight`` after epochs 1, 1 + ``kl_decay_epochs``, and so on.
        kl_decay_epochs: epochs between two such factors.
        balance_decay: factor on ``balance_weight``, likewise.
        balance_decay_epochs: epochs between two such factors.
        compat_cumulative_masks: let each specialised teacher have the masks of those before it
            too, as the released code does.
    """

    relational = True

    def __init__(
        self,
        *,
        temperature: Positive = 4.0,
        layers: PositiveInt = 2,
        teacher_layers: list[str] | None = None,
        aux_layers: list[str] | None = None,
        masks: bool = True,
        mask_heads: PositiveInt = 3,
        mask_reduction: PositiveInt = 2,
        routing: Literal["topk", "soft"] = "topk",
        k: PositiveInt = 1,
        lb_mode: Literal["KL", "CV"] = "KL",
        supervised_weight: NonNegative = 1.0,
        kl_weight: NonNegative = 1.0,
        balance_weight: NonNegative = 1.0,
        kl_decay: Positive = 0.5,
        kl_decay_epochs: PositiveInt = 30,
        balance_decay: Positive = 0.9,
        balance_decay_epochs: PositiveInt = 10,
        compat_cumulative_masks: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.layers = layers
        self.chosen_layers = {"teacher": teacher_layers, "aux_teacher": aux_layers}
        self.masks = masks
        self.mask_heads, self.mask_reduction = mask_heads, mask_reduction
        self.routing, self.k, self.lb_mode = routing, k, lb_mode
        self.factors = {SUPERVISED: supervised_weight, KD: kl_weight, BALANCE: balance_weight}
        self.decays = {
            KD: (kl_decay, kl_decay_epochs),
            BALANCE: (balance_decay, balance_decay_epochs),
        }
        self.compat_cumulative_masks = compat_cumulative_masks

    def roles(self) -> Mapping[str, str]:
        """The teacher of both modalities, and that of the modality the student lacks."""
        return TEACHERS

    def wrap_teachers(
        self, teachers: Mapping[str, nn.Module], sample: Any
    ) -> Mapping[str, nn.Module]:
        """The specialised teachers, masks untrained: ``teacher_1``, ..., ``aux_teacher_1``, ..."""
        if not self.masks:
            return teachers
        found: dict[str, nn.Module] = {}
        for role, teacher in teachers.items():
            locations = self.chosen_layers[role]
            if locations is None:
                locations = deepest_layers(teacher, self.layers, sample)
            specialists = specialised(
                teacher, locations, sample, heads=self.mask_heads, reduction=self.mask_reduction
            )
            found |= {f"{role}_{number}": s for number, s in enumerate(specialists, start=1)}
        return found

    def teachers_of_phase_3(
        self, specialists: Mapping[str, SpecialisedTeacher]
    ) -> dict[str, SpecialisedTeacher]:
        """The specialised teachers as the student meets them: see ``compat_cumulative_masks``."""
        if not self.compat_cumulative_masks:
            return dict(specialists)
        found: dict[str, SpecialisedTeacher] = {}
        for role in TEACHERS:
            own = of_teacher(role, specialists)
            stacked = accumulated([specialists[name] for name in own])
            found |= dict(zip(own, stacked, strict=True))
        return found

    def setup(self, student: ModelOutput, teachers: Mapping[str, ModelOutput]) -> None:
        """Build the gate: two linear layers without a nonlinearity, from C by 2C to N.

        Raises:
            ValueError: fewer than two specialised teachers, or fewer than k.
        """
        count, classes = len(teachers), student.logits.shape[-1]
        if count < 2:
            raise ValueError(f"{count} specialised teachers leave nothing to choose from")
        if self.k > count:
            raise ValueError(
                f"k={self.k}: there are {count} specialised teachers; lower method.k or raise "
                "method.layers"
            )
        self.gate = nn.Sequential(nn.Linear(classes, 2 * classes), nn.Linear(2 * classes, count))

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Supervised loss, divergence from the routed teachers, balance of the gate."""
        logits = student.logits
        gates = torch.softmax(self.gate(logits), dim=-1)
        others = torch.stack([teacher.logits for teacher in teachers.values()], dim=1)
        options = {"temperature": self.temperature, "t_squared": True}
        if self.routing == "soft":
            divergence = mixed_divergence(logits, others, gates, **options)
            parts = gates.mean(0)
        else:
            chosen = gates.topk(self.k, dim=-1).indices
            divergence = routed_divergence(logits, others, chosen, **options)
            parts = shares(chosen, len(teachers))
        for role, part in zip(teachers, parts, strict=True):
            self.record(f"share_{role}", part)
        with torch.no_grad():
            theirs = [self.supervised_loss(teacher, batch) for teacher in teachers.values()]
            self.record("teachers_supervised", torch.stack(theirs).mean())
        balance = balance_divergence if self.lb_mode == "KL" else balance_variation
        return {
            SUPERVISED: self.supervised_loss(student, batch),
            KD: divergence,
            BALANCE: balance(gates),
        }

    def weights(self, progress: Progress) -> dict[str, float]:
        """The factors, after as many decays as epochs 1, 1 + n, 1 + 2n, ... are past."""
        weights = dict(self.factors)
        for term, (decay, epochs) in self.decays.items():
            weights[term] *= decay ** math.ceil(progress.epoch / epochs)
        return weights


class CoTraining(Method):
    """Phase 1: three networks learn from the labels and from each other, nothing detached.

    Args:
        temperature: T of the divergences.
    """

    trainable_roles = tuple(TEACHERS)

    def __init__(self, *, temperature: Positive = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def roles(self) -> Mapping[str, str]:
        """As in ``MST``; both are trained."""
        return TEACHERS

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """A supervised and a mutual term of every network."""
        outputs = {STUDENT: student, **teachers}
        terms = {}
        for role, output in outputs.items():
            divergences = [
                kl_divergence(
                    output.logits, other.logits, temperature=self.temperature, t_squared=True
                )
                for other in outputs.values()
                if other is not output
            ]
            ending = "" if role == STUDENT else f"_{role}"
            terms[f"supervised{ending}"] = self.supervised_loss(output, batch)
            terms[f"mutual{ending}"] = torch.stack(divergences).sum()
        return terms


class Specialisation(Method):
    """Phase 2: each specialised teacher approaches the frozen student, by its own mask alone.

    The first specialised teacher takes the place of the student, the others are trained roles: so
    each has its own optimiser. The student is the role ``target``.

    Args:
        names: of the specialised teachers.
        temperature: T of the divergences.
    """

    tasks = ()

    def __init__(self, *, names: list[str], temperature: Positive = 4.0) -> None:
        super().__init__()
        self.first, *rest = names
        self.trainable_roles = tuple(rest)
        self.temperature = temperature

    def roles(self) -> Mapping[str, str]:
        """All take the settings of the student's training."""
        return dict.fromkeys((*self.trainable_roles, TARGET), STUDENT)

    def wrap(self, student: nn.Module, teachers: Mapping[str, nn.Module], sample: Any) -> nn.Module:
        """Remember all specialised teachers, which are judged and saved together."""
        specialists = {self.first: student}
        specialists |= {role: teachers[role] for role in self.trainable_roles}
        # In a tuple: the masks are parameters of the networks, not of the method.
        self._panel = (Panel(specialists, teachers[TARGET]),)
        return student

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """A divergence for each specialised teacher; none depends on another's mask."""
        target = teachers[TARGET].logits.detach()
        learners = {self.first: student}
        learners |= {role: teachers[role] for role in self.trainable_roles}
        return {
            f"kl_{name}": kl_divergence(
                learner.logits, target, temperature=self.temperature, t_squared=True
            )
            for name, learner in learners.items()
        }

    def deploy(self, student: nn.Module) -> nn.Module:
        """All specialised teachers together."""
        return self._panel[0]


class Panel(nn.Module):
    """Specialised teachers beside the network they approach; its parameters are the masks.

    Args:
        specialists: by name.
        target: the network that they approach.
    """

    def __init__(self, specialists: Mapping[str, SpecialisedTeacher], target: nn.Module) -> None:
        super().__init__()
        self.masks = nn.ModuleDict({name: s.mask for name, s in specialists.items()})
        self._parts = dict(specialists), target

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> ModelOutput:
        """The target's logits; in ``extra`` by specialist: its logits (``masked``), those of its
        teacher without the mask (``plain``), and the standard deviation of its mask over channels,
        ``(B,)`` (``spread``)."""
        specialists, target = self._parts
        output = ModelOutput(_logits(target(*inputs, **named)))
        extra: dict[str, dict[str, Tensor]] = {"masked": {}, "plain": {}, "spread": {}}
        known: dict[int, Tensor] = {}
        for name, specialist in specialists.items():
            teacher = specialist.teacher
            if id(teacher) not in known:
                known[id(teacher)] = _logits(teacher(*inputs, **named))
            extra["plain"][name] = known[id(teacher)]
            seen: list[Tensor] = []
            with ExitStack() as stack:
                hook = specialist.mask.register_forward_hook(
                    lambda *call, s=seen: s.append(call[2])
                )
                stack.enter_context(hook)
                extra["masked"][name] = _logits(specialist(*inputs, **named))
            extra["spread"][name] = seen[0].std(dim=-1)
        output.extra.update(extra)
        return output


def of_teacher(role: str, names: Iterable[str]) -> list[str]:
    """The specialised teachers made from the network of a role, among all of them."""
    return [name for name in names if name.rpartition("_")[0] == role]


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
