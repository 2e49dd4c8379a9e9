"""Stages that adapt a zero-shot teacher to the few labels there are: Tip-Adapter-F and CLAP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun import distributed
from kdrun.assembly import assemble
from kdrun.checkpoints import load_weights, read_weights, save_weights
from kdrun.data.loader import Loader, LoaderOptions
from kdrun.data.module import DataModule
from kdrun.data.partial import PartlyLabelled
from kdrun.data.seeding import stream_seed
from kdrun.errors import UserError
from kdrun.evaluation import evaluation_device
from kdrun.method import Method
from kdrun.models.adapters import (
    ClapClassifier,
    TipAdapter,
    affinity,
    cache_logits,
    multipliers,
)
from kdrun.models.vision_language import ZeroShot, zero_shot_logits
from kdrun.outputs import Batch, ModelOutput, Progress
from kdrun.parameters import Fraction, NonNegative, Positive, PositiveInt
from kdrun.stages.stage import Context, Stage
from kdrun.stages.train import Supervised, load_network
from kdrun.stages.training import train, training_key

TEACHER = "teacher"
"""The config entry whose network is adapted."""
WEIGHTS = "network.safetensors"
EMBEDDED_AT_ONCE = 256
"""Images that the teacher embeds at once."""
KEYS = 5
"""What the random stream of Tip-Adapter's augmented passes is for; see ``kdrun.data.loader``."""


class _Adaptation(Stage):
    """Adapts the teacher to the labelled samples; from then on the run learns from the result."""

    def check(self, config: Mapping[str, Any], data: DataModule) -> None:
        """Refuse data without a labelled part."""
        if not isinstance(data, PartlyLabelled):
            raise UserError(
                "this recipe adapts the teacher to few labels, but the data set has them all: "
                "choose one with few labels, such as dataset=digits_few_shot"
            )

    def key(self, context: Context) -> dict[str, Any]:
        """Teacher, labelled data and every setting."""
        return {
            "adaptation": type(self).__name__,
            "settings": dict(vars(self)),
            "teacher": context.artefacts[TEACHER].name,
            "seed": context.config["seed"],
        } | training_key(context, "student")

    def _train(
        self,
        context: Context,
        name: str,
        directory: Path,
        network: nn.Module,
        method: Method,
        settings: Mapping[str, Any],
        data: PartlyLabelled,
    ) -> None:
        """Train what is trainable of the network on the labelled samples."""
        config = context.config | {"training": context.config["training"] | dict(settings)}
        context = replace(context, config=config, data=data)
        seed = config["seed"]
        assembly = assemble(method, network, {}, task=context.task, data=data, seed=seed)
        train(
            context,
            assembly,
            name=name,
            role="student",
            seed=seed,
            key=self.key(context),
            directory=directory,
        )


def _schedule(name: str, warmup_epochs: float = 0.0) -> dict[str, Any]:
    return {
        "name": name,
        "warmup_epochs": warmup_epochs,
        "milestones": [],
        "gamma": 0.1,
        "min_lr": 0.0,
    }


def _base(context: Context) -> nn.Module:
    network = load_network(context, TEACHER)
    if not isinstance(network, ZeroShot):
        raise UserError(
            f"{TEACHER}={context.names.get(TEACHER)} has no class embeddings to adapt: choose a "
            "vision-language one such as teacher=two_tower or teacher=clip"
        )
    return network


def _device(context: Context) -> torch.device:
    return evaluation_device(context.config["trainer"]["accelerator"])


@torch.no_grad()
def _embedded(network: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """Image embeddings ``(M, D)`` and targets ``(M,)`` of a loader's epoch, where the network is.

    Args:
        network: on the device of the loader.
        loader: in stored order.
    """
    pairs = [(network.encode_image(batch.inputs), batch.target) for batch in loader]
    return torch.cat([features for features, _ in pairs]), torch.cat([t for _, t in pairs])


class TipAdapt(_Adaptation):
    """Tip-Adapter-F (Zhang et al., ECCV 2022) as DHO's few-shot teacher.

    Keys start as the embeddings of the labelled images, averaged over augmented passes, and are
    trained with cross-entropy; then strength and sharpness are searched on validation. The
    training settings are those of Tip-Adapter's release, as far as they are known.

    Args:
        passes: augmented passes over the labelled images that keys are averaged over.
        epochs: of training the keys.
        batch_size: of that training.
        lr: at its peak, of AdamW with a cosine schedule.
        strength: a, while the keys are trained.
        sharpness: b, likewise.
        largest_strength: end of the range from 0.1 on that a is searched in, in 20 steps.
        largest_sharpness: likewise of b, in 200 steps.
    """

    def __init__(
        self,
        *,
        passes: PositiveInt = 10,
        epochs: PositiveInt = 20,
        batch_size: PositiveInt = 256,
        lr: Positive = 0.001,
        strength: Positive = 1.17,
        sharpness: Positive = 1.0,
        largest_strength: Positive = 3.0,
        largest_sharpness: Positive = 7.0,
    ) -> None:
        self.passes, self.epochs, self.batch_size, self.lr = passes, epochs, batch_size, lr
        self.strength, self.sharpness = strength, sharpness
        self.largest_strength, self.largest_sharpness = largest_strength, largest_sharpness

    def adapted(self, context: Context, name: str) -> dict[str, nn.Module]:
        """The adapter, from which the run learns."""
        path = context.artefacts[name].path(f"{name}/{WEIGHTS}")
        saved = read_weights(path)
        network = TipAdapter(_base(context), saved["keys"], saved["values"])
        load_weights(network, path)
        return {TEACHER: network}

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Train the keys, then search strength and sharpness."""
        data, folder = context.data, directory / name
        assert isinstance(data, PartlyLabelled)
        folder.mkdir(exist_ok=True)
        network = self._network(context)
        settings = {
            "epochs": self.epochs if context.limit_batches is None else 1,
            "batch_size": self.batch_size,
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": self.lr, "eps": 1e-4},
            "scheduler": _schedule("cosine"),
        }
        once = data.paired("cycle_unlabelled", None)
        self._train(context, name, folder, network, Supervised(), settings, once)
        self._search(context, network.to(_device(context)).eval())
        if distributed.rank() == 0:
            save_weights(network.cpu(), folder / WEIGHTS)

    def _network(self, context: Context) -> TipAdapter:
        """The adapter before its keys are trained."""
        base = _base(context)
        data = context.data
        assert isinstance(data, PartlyLabelled)
        keys = self._keys(base.to(_device(context)), data, context).cpu()
        values = F.one_hot(data.labelled.target, data.num_classes).float()
        base.cpu()
        return TipAdapter(base, keys, values, strength=self.strength, sharpness=self.sharpness)

    def _keys(self, base: nn.Module, data: PartlyLabelled, context: Context) -> Tensor:
        """Unit vectors ``(M, D)``, in the order of the labelled samples."""
        seed = stream_seed(context.config["seed"], KEYS)
        options = LoaderOptions(EMBEDDED_AT_ONCE, _device(context), seed, augment=True)
        loader = data.loader("labelled", options)
        total = torch.zeros(())
        for number in range(self.passes):
            loader.set_epoch(number)
            total = total + F.normalize(_embedded(base, loader)[0], dim=-1)
        return F.normalize(total / self.passes, dim=-1)

    @torch.no_grad()
    def _search(self, context: Context, network: TipAdapter) -> None:
        options = LoaderOptions(EMBEDDED_AT_ONCE, _device(context))
        features, target = _embedded(network.base, context.data.loader("validation", options))
        zero_shot = zero_shot_logits(features, network.base.zero_shot_embeddings(), network.scale)
        near = affinity(features, network.keys)
        best = -1
        for sharpness in _grid(self.largest_sharpness, 200):
            cached = cache_logits(near, network.values, sharpness)
            for strength in _grid(self.largest_strength, 20):
                logits = zero_shot + strength * cached
                right = int((logits.argmax(-1) == target).sum())
                if right > best:
                    best = right
                    network.strength.fill_(strength)
                    network.sharpness.fill_(sharpness)
        context.console.say(
            f"tip adapter: strength {float(network.strength):.2f}, sharpness "
            f"{float(network.sharpness):.2f}, right on {best} of {len(target)} validation samples"
        )


def _grid(largest: float, steps: int) -> list[float]:
    """``steps`` numbers from 0.1 on, evenly spaced, that end one step before ``largest``."""
    return [0.1 + number * (largest - 0.1) / steps for number in range(steps)]


class _Constrained(Supervised):
    """Cross-entropy and CLAP's constraint."""

    def __init__(self, network: ClapClassifier) -> None:
        super().__init__()
        # In a list: the network is no part of the method.
        self._network = [network]

    def losses(
        self,
        student: ModelOutput,
        teachers: Mapping[str, ModelOutput],
        batch: Batch,
        progress: Progress,
    ) -> dict[str, Tensor]:
        """Both terms count once."""
        terms = super().losses(student, teachers, batch, progress)
        return terms | {"constraint": self._network[0].constraint()}


class ClapAdapt(_Adaptation):
    """CLAP as PCoreSet's few-shot teacher: prototypes trained on the labels of each round.

    SGD with a linear schedule on batches drawn with replacement, ``passes`` times the labelled
    samples in all; the last prototypes are taken. Images are augmented as the data set says, which
    in the release is a crop of 8 % to all of the area.

    Args:
        passes: over the labelled samples.
        batch_size: of each step.
        lr: at its peak.
        momentum: of SGD.
        warmup: share of the steps in which the rate rises.
        lag: rounds by which the teacher is behind. 0: the student learns from the teacher of its
            own round. 1, as the release's script for small sets: from that of the round before, in
            the first round from the zero-shot one.
    """

    def __init__(
        self,
        *,
        passes: PositiveInt = 300,
        batch_size: PositiveInt = 64,
        lr: Positive = 0.01,
        momentum: NonNegative = 0.9,
        warmup: Fraction = 0.1,
        lag: Literal[0, 1] = 0,
    ) -> None:
        self.passes, self.batch_size, self.lr = passes, batch_size, lr
        self.momentum, self.warmup, self.lag = momentum, warmup, lag

    def adapted(self, context: Context, name: str) -> dict[str, nn.Module]:
        """The classifier that is due, from which the round learns."""
        source = context.artefacts[name]
        if self.lag:
            if "previous" not in context.artefacts:
                return {}
            source = context.artefacts["previous"]
        network = ClapClassifier(_base(context), torch.zeros(context.data.num_classes))
        load_weights(network, source.path(f"{name}/{WEIGHTS}"))
        return {TEACHER: network}

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """Train the prototypes of this round from the sentences on."""
        data, folder = context.data, directory / name
        assert isinstance(data, PartlyLabelled)
        folder.mkdir(exist_ok=True)
        base = _base(context)
        base.to(_device(context))
        options = LoaderOptions(EMBEDDED_AT_ONCE, _device(context))
        features, target = _embedded(base, data.loader("labelled", options))
        with torch.no_grad():
            zero_shot = zero_shot_logits(features, base.zero_shot_embeddings(), base.scale)
        probabilities = zero_shot.softmax(dim=-1)
        weights = multipliers(probabilities.cpu(), target.cpu(), data.num_classes)
        base.cpu()
        network = ClapClassifier(base, weights)
        steps = max(1, self.passes * len(target) // self.batch_size)
        optimizer = {"_target_": "torch.optim.SGD", "lr": self.lr, "momentum": self.momentum}
        settings = {
            "epochs": 1,
            "batch_size": self.batch_size,
            "optimizer": optimizer,
            "scheduler": _schedule("linear", self.warmup),
        }
        drawn = data.paired("with_replacement", steps)
        self._train(context, name, folder, network, _Constrained(network), settings, drawn)
