"""The stage that repeats stages: after each round, some samples of the pool get a label."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from kdrun import distributed
from kdrun.assembly import make_method
from kdrun.checkpoints import load_weights
from kdrun.data.loader import LoaderOptions
from kdrun.data.module import DataModule
from kdrun.data.partial import PartlyLabelled
from kdrun.data.seeding import stream_seed
from kdrun.errors import UserError
from kdrun.evaluation import evaluation_device
from kdrun.files import read_json, write_atomically, write_json
from kdrun.forward import run_network
from kdrun.layers.taps import Taps
from kdrun.method import Acquisition
from kdrun.outputs import Batch, ModelOutput
from kdrun.stages.distil import assemble_run
from kdrun.stages.stage import Artefacts, Context, Stage
from kdrun.store import Artefact, make_once

FACTS = "round.json"
"""What a finished round tells: its labelled samples, those chosen after it, its results."""
SHIPPED = (
    *("student.safetensors", "student_best.safetensors", "training.json", "metrics.csv"),
    "predictions.safetensors",
)
"""Files of the last round that are the run's own as well."""


class Rounds(Stage):
    """Train and evaluate, let the method choose samples, label them, and begin again.

    Round ``r`` lies in ``round_<r>`` of the run's directory and is skipped once it is finished;
    within a round, training goes on from its checkpoint. Every round starts from the same initial
    student. After each but the last, the student's outputs on the pool (``pool.safetensors``) and
    on the labelled samples (``labelled.safetensors``) are kept, by the samples' numbers.

    Args:
        stages: the stages of one round, by name; ``distil`` and ``evaluate`` among them.
    """

    def __init__(self, *, stages: dict) -> None:
        # A stage set to null is taken out.
        self.stages: Mapping[str, Stage] = {n: s for n, s in stages.items() if s is not None}
        for name in ("distil", "evaluate"):
            if name not in self.stages:
                raise ValueError(f"a round needs a stage {name}")

    def check(self, config: Mapping[str, Any], data: DataModule) -> None:
        """Refuse a method that chooses nothing, and more labels than there are samples."""
        method = make_method(config["method"])
        if not isinstance(method, Acquisition):
            raise UserError(
                f"this recipe works in rounds, but {config['method']['_target_']} chooses no "
                "samples: choose method=pcoreset or another recipe"
            )
        if not isinstance(data, PartlyLabelled):
            raise UserError(
                "this recipe buys labels, but the data set has them all: choose "
                "dataset=digits_active or another one with few labels"
            )
        wanted = method.rounds * (method.queries or data.num_classes)
        pool = len(data.unlabelled)
        if wanted >= pool:
            raise UserError(
                f"method.rounds={method.rounds}: asks for {wanted} labels in all, but only {pool} "
                "samples have none and one must be left; lower it or method.queries"
            )
        for stage in self.stages.values():
            stage.check(config, data)

    def produce(self, context: Context, name: str, directory: Path) -> None:
        """All rounds, one after the other; what the last one leaves is the run's."""
        method, data = make_method(context.config["method"]), context.data
        assert isinstance(method, Acquisition) and isinstance(data, PartlyLabelled)
        rounds = _rounds_after_the_first(method, context)
        known, told, previous = data.labelled.index, [], None
        for number in range(rounds + 1):
            context.watch.raise_if_received()
            now = self._context(context, known, directory / f"round_{number}", previous)
            last = number == rounds
            if last and method.final_epochs is not None and context.limit_batches is None:
                training = now.config["training"] | {"epochs": method.final_epochs}
                now.config = now.config | {"training": training}
            facts = self._round(now, number, last)
            told.append(facts)
            self._report(context, facts, number, rounds)
            known = torch.cat([known, torch.tensor(facts["selected"], dtype=torch.int64)])
            previous = Artefact(now.run_directory, {})
        if distributed.rank() == 0:
            for file in SHIPPED:
                shutil.copyfile(now.run_directory / file, directory / file)
        context.artefacts["distil"] = Artefact(now.run_directory, {})
        context.result["networks"] = told[-1]["networks"]
        context.result["objective"] = told[-1]["objective"]
        context.result["rounds"] = [
            {"labelled": len(facts["labelled"]), "networks": facts["networks"]} for facts in told
        ]

    def adapted(self, context: Context, name: str) -> dict[str, nn.Module]:
        """What the stages of the last round have adapted."""
        method, directory = make_method(context.config["method"]), context.artefacts[name].directory
        assert isinstance(method, Acquisition)
        last = _rounds_after_the_first(method, context)
        artefacts = Artefacts(context.artefacts)
        if last:
            artefacts["previous"] = Artefact(directory / f"round_{last - 1}", {})
        networks: dict[str, nn.Module] = {}
        for inner, stage in self.stages.items():
            artefacts[inner] = Artefact(directory / f"round_{last}", {})
            networks |= stage.adapted(replace(context, artefacts=artefacts), inner)
        return networks

    def _context(
        self, context: Context, known: Tensor, folder: Path, previous: Artefact | None
    ) -> Context:
        """What the stages of one round work with."""
        assert isinstance(context.data, PartlyLabelled)
        artefacts = Artefacts(context.artefacts)
        if previous is not None:
            artefacts["previous"] = previous
        return replace(
            context,
            data=context.data.with_labels(known),
            run_directory=folder,
            artefacts=artefacts,
            networks=dict(context.networks),
            result={},
        )

    def _round(self, context: Context, number: int, last: bool) -> dict[str, Any]:
        """One round, or what it left when it was finished before."""
        data = context.data
        assert isinstance(data, PartlyLabelled)

        def produce(folder: Path) -> None:
            for name, stage in self.stages.items():
                context.watch.raise_if_received()
                stage.run(context, name)
            facts = {
                "labelled": data.labelled.index.tolist(),
                "networks": context.result["networks"],
                "objective": context.result["objective"],
                "selected": [],
                "radii": [],
            }
            if not last:
                facts |= self._select(context, number, folder)
            if distributed.rank() == 0:
                write_json(folder / FACTS, facts)
            distributed.barrier()

        key = {"round": number, "labelled": data.labelled.index.tolist()}
        make_once(
            context.run_directory,
            key,
            produce,
            context.console.say,
            context.watch.raise_if_received,
            what="round",
        )
        return read_json(context.run_directory / FACTS)

    def _select(self, context: Context, number: int, folder: Path) -> dict[str, Any]:
        """Run the student over pool and labelled samples, keep what it says, and choose."""
        data = context.data
        assert isinstance(data, PartlyLabelled)
        assembly = assemble_run(context)
        method, student = assembly.method, assembly.deployed()
        assert isinstance(method, Acquisition)
        load_weights(student, folder / "student.safetensors")
        device = evaluation_device(context.config["trainer"]["accelerator"])
        student.to(device).eval()
        size = data.evaluation_batch_size(context.config["training"]["batch_size"])
        outputs = {}
        for part in ("unlabelled", "labelled"):
            batches = data.loader(part, LoaderOptions(batch_size=size, device=device))
            pairs = _outputs(context, student, assembly.taps.get("student"), batches)
            output, index = joined(pairs)
            outputs[part] = output
            file = "pool" if part == "unlabelled" else part
            if distributed.rank() == 0:
                tensors = {"index": index, "logits": output.logits}
                tensors |= {name: value.contiguous() for name, value in output.features.items()}
                content = safetensors.torch.save(tensors)
                write_atomically(folder / f"{file}.safetensors", content)
        count = method.queries or data.num_classes
        chosen = method.select(
            outputs["unlabelled"],
            outputs["labelled"],
            data.labelled.target,
            min(count, len(data.unlabelled)),
            stream_seed(context.config["seed"], number),
        )
        return {
            "selected": data.unlabelled.index[chosen.rows].tolist(),
            "radii": [] if chosen.radii is None else chosen.radii.tolist(),
        }

    def _report(self, context: Context, facts: Mapping[str, Any], number: int, rounds: int) -> None:
        metric = context.task.objective
        value = facts["networks"]["distilled"]["test_last"][metric]
        context.console.say(
            f"round {number} of {rounds}: {len(facts['labelled'])} labels, "
            f"test {metric} {value:.2f}"
        )


def _rounds_after_the_first(method: Acquisition, context: Context) -> int:
    """As the method says; a trial has one."""
    return method.rounds if context.limit_batches is None else 1


@torch.no_grad()
def _outputs(
    context: Context, student: nn.Module, taps: Taps | None, batches: Iterable[Batch]
) -> Iterator[tuple[ModelOutput, Batch]]:
    """The student's output, with its taps, on each batch."""
    for batch in batches:
        yield run_network(context.task, student, batch, taps), batch


def joined(pairs: Iterable[tuple[ModelOutput, Batch]]) -> tuple[ModelOutput, Tensor]:
    """Outputs on batches as one output on all their samples, on the CPU, and the samples' numbers.

    Args:
        pairs: outputs and the batches that they are of, at least one.
    """
    outputs: list[ModelOutput] = []
    numbers: list[Tensor] = []
    for output, batch in pairs:
        features = {name: value.float().cpu() for name, value in output.features.items()}
        outputs.append(ModelOutput(output.logits.float().cpu(), features))
        numbers.append(batch.index.cpu())
    features = {
        name: torch.cat([output.features[name] for output in outputs])
        for name in outputs[0].features
    }
    logits = torch.cat([output.logits for output in outputs])
    return ModelOutput(logits, features), torch.cat(numbers)
