"""What becomes of a finished run's student: tested again, or written for other programs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdrun.artefacts import RESULT, is_complete
from kdrun.assembly import (
    Assembly,
    assemble_untrained,
    build_untrained,
    make_method,
    with_batch_statistics,
)
from kdrun.build import allowing
from kdrun.catalogue import Catalogue, load_yaml, nearest
from kdrun.checkpoints import load_weights
from kdrun.config import compose
from kdrun.data.batches import described
from kdrun.data.module import DataModule
from kdrun.errors import UserError
from kdrun.experiment import prepare_data, stages_of
from kdrun.export import FORMATS, SUFFIXES, export
from kdrun.files import read_json, write_json
from kdrun.identity import fingerprint, output_directory
from kdrun.interruption import SignalWatch
from kdrun.logs import Console
from kdrun.outputs import Batch
from kdrun.process import prepare_process
from kdrun.report.summary import networks_table
from kdrun.runs import CONFIG, stored_words
from kdrun.stages.evaluate import EPOCHS, results_on_test
from kdrun.stages.stage import Artefacts, Context
from kdrun.stages.train import load_network
from kdrun.store import Artefact, Store

Epoch = Literal["last", "best"]


@dataclass(frozen=True)
class FinishedRun:
    """A run's directory, its configuration and its result."""

    directory: Path
    config: dict[str, Any]
    result: dict[str, Any]

    def weights(self, epoch: Epoch) -> Path:
        """The file of the student's weights."""
        return self.directory / f"student{EPOCHS[epoch]}.safetensors"

    def artefacts(self) -> dict[str, Artefact]:
        """The shared artefacts of the run that are still in the store beside it, by stage."""
        above = output_directory(self.directory)
        if above is None:
            return {}
        store = above / "store"
        named = {stage: store / name for stage, name in self.result["artefacts"].items()}
        return {
            stage: Artefact(directory, {})
            for stage, directory in named.items()
            if is_complete(directory)
        }


def read_run(directory: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        UserError: it is not finished, or a file of it is damaged.
    """
    if not is_complete(directory, contents=True, names=(CONFIG, RESULT)):
        raise UserError(f"{directory} is not finished; continue it with: kdrun resume {directory}")
    config, result = load_yaml(directory / CONFIG), read_json(directory / RESULT)
    # Options that a stage of the run has chosen.
    config["student"] |= result.get("student", {})
    return FinishedRun(directory, config, result)


def load_student(directory: str | Path, epoch: Epoch = "last") -> nn.Module:
    """The deployed student of a finished run, in evaluation mode, on the CPU.

    Args:
        directory: of the run.
        epoch: weights after the last epoch, or after the best one on validation.

    Raises:
        UserError: the run is not finished, or its data set is not there.
    """
    run = read_run(Path(directory))
    with allowing(run.config["allow_packages"]):
        return _deployed(run, epoch, assemble_untrained(run.config, *prepare_data(run.config)))


# -- kdrun eval ------------------------------------------------------------------------------------


def evaluate_run(directory: Path, words: Sequence[str], catalogue: Catalogue) -> None:
    """Test a finished run's student again; print and write the result.

    Teacher and student alone are tested too where the store still has them, a teacher that the run
    has adapted as it was when the student learned from it; a line tells what the run has tested and
    this does not.

    Args:
        directory: of the run; ``eval-<data set>.json`` is written there.
        words: ``dataset=...`` and options of it, for another test set; ``trainer=...``.
        catalogue: the config files, for the words.

    Raises:
        UserError: the run is not finished, the words are of other groups, or the data set has
            other classes or inputs than the networks.
    """
    run = read_run(directory)
    config, names = run.config, dict(run.result["names"])
    if words:
        config, names = _with_words(run, words, catalogue)
    prepare_process(config["trainer"])
    with allowing(config["allow_packages"]):
        data, task = prepare_data(config)
        name = names["dataset"]
        classes = run.result["num_classes"]
        if data.num_classes != classes:
            raise UserError(
                f"{name} has {data.num_classes} classes, but {directory} was trained on {classes}: "
                "choose a data set with the same classes"
            )
        context = Context(
            config=config,
            names=names,
            data=data,
            task=task,
            store=Store(directory.parent),
            run_directory=directory,
            console=Console(config["trainer"]["progress"]),
            watch=SignalWatch(),
            artefacts=Artefacts(run.artefacts()),
        )
        try:
            networks = _networks(run, context)
        except UserError as error:
            ours, theirs = (described(s) for s in (run.result["input_shape"], data.input_shape))
            if ours == theirs:
                raise
            raise UserError(
                f"{name} has inputs of {theirs}, but {directory} was trained on {ours}: {error}"
            ) from error
        roles = make_method(config["method"]).roles()
        networks_results = results_on_test(context, networks, sources=roles)
    result = {
        "run": str(directory),
        "dataset": name,
        "options": config["dataset"],
        "data": data.fingerprint,
        "samples": data.test_size,
        "metric": task.objective,
        "direction": task.direction,
        "networks": networks_results,
    }
    changed = any(word.startswith("dataset.") for word in words)
    ending = f"-{fingerprint(config['dataset'], 8)}" if changed else ""
    path = directory / f"eval-{name.replace('/', '_')}{ending}.json"
    print(f"{name}, {data.test_size:,} test samples")
    print(networks_table(task.objective, networks_results))
    write_json(path, result)
    print(path)


def _with_words(
    run: FinishedRun, words: Sequence[str], catalogue: Catalogue
) -> tuple[dict[str, Any], dict[str, str]]:
    """The run's configuration with data set and trainer as the words say."""
    groups = ("dataset", "trainer")
    typed = {word.partition("=")[0]: word for word in words}
    for key, word in typed.items():
        if key.split(".")[0] not in groups:
            raise UserError(f"{word}: eval takes options of {' and '.join(groups)} only")
    kept = [
        word
        for word in stored_words(run.directory)
        if (key := word.partition("=")[0]).split(".")[0] in groups
        and key not in typed
        and key.split(".")[0] not in typed
    ]
    composed = compose([*kept, *words], catalogue)
    chosen = {group: composed.values[group] for group in groups}
    packages = {"allow_packages": composed.values["allow_packages"]}
    packages["allow_packages"] += run.config["allow_packages"]
    names = {group: composed.names[group] for group in groups}
    return run.config | chosen | packages, {**run.result["names"], **names}


def _networks(run: FinishedRun, context: Context) -> dict[str, nn.Module]:
    """Everything that can be tested, named for ``results_on_test``."""
    config, data = context.config, context.data
    assembly = assemble_untrained(config, data, context.task)
    networks: dict[str, nn.Module] = {}
    for name, stage in stages_of(config).items():
        if name in context.artefacts:
            networks |= stage.tested(context)
    for role, source in assembly.method.roles().items():
        if role in assembly.method.trainable_roles:
            networks[role] = assembly.teachers[role]
            load_weights(networks[role], run.directory / f"{role}.safetensors")
        elif source in context.artefacts:
            try:
                network = _as_it_taught(run, context, source)
            except UserError as error:
                # One that is built for the inputs of the run's own data set.
                print(f"{role} is left out: {error}")
                continue
            statistics = config[source]["mode"] == "batch_stats"
            networks[role] = with_batch_statistics(network) if statistics else network
    for epoch, ending in EPOCHS.items():
        if "alone" in context.artefacts:
            alone = build_untrained(config["student"], data, config["seed"])
            load_weights(alone, context.artefacts["alone"].path(f"network{ending}.safetensors"))
            networks[f"alone/{epoch}"] = alone
        networks[f"distilled/{epoch}"] = _deployed(run, epoch, assembly)
    _tell_of_the_others(run, context, networks, assembly.method.roles())
    return networks


def _tell_of_the_others(
    run: FinishedRun,
    context: Context,
    networks: Mapping[str, nn.Module],
    roles: Mapping[str, str],
) -> None:
    """Say which networks that the run has tested are not tested now, and why."""
    tested = {label.partition("/")[0] for label in networks}
    for role in run.result["networks"]:
        stage = roles.get(role, role)
        if role in tested or stage in context.artefacts:  # The latter was told of above.
            continue
        stored = stage in run.result["artefacts"]
        why = "the store no longer has it" if stored else "only its run can test it"
        print(f"{role} is left out: {why}")


def _as_it_taught(run: FinishedRun, context: Context, source: str) -> nn.Module:
    """A frozen network as the student learned from it, adapted where a stage of the run did that.

    Raises:
        UserError: it does not fit this data.
    """
    context = replace(context, artefacts=Artefacts(context.artefacts), networks={})
    for name, stage in stages_of(context.config).items():
        context.artefacts.setdefault(name, Artefact(run.directory, {}))
        context.networks |= stage.adapted(context, name)
    return load_network(context, source)


def _deployed(run: FinishedRun, epoch: Epoch, assembly: Assembly) -> nn.Module:
    network = copy.deepcopy(assembly.deployed())
    load_weights(network, run.weights(epoch))
    return network.eval()


# -- kdrun export ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportRequest:
    """What to write where; see ``read_request``."""

    format: str
    path: Path
    epoch: Epoch


def export_run(directory: Path, words: Sequence[str]) -> None:
    """Write a finished run's deployed student for other programs, and say how to load it.

    Args:
        directory: of the run.
        words: see ``read_request``.

    Raises:
        UserError: the run is not finished, the words cannot be read, a package is missing, or the
            network cannot be exported.
    """
    run = read_run(directory)
    request = read_request(directory, words)
    prepare_process(run.config["trainer"])
    with allowing(run.config["allow_packages"]):
        data, task = prepare_data(run.config)
        network = _deployed(run, request.epoch, assemble_untrained(run.config, data, task))
    batch = next(iter(data.test(batch_size=5, device="cpu")))
    reads = run.config["student"]["reads"]
    if reads is not None:
        batch = replace(batch, inputs=batch.inputs[reads])
    difference = export(network, task, batch, request.format, request.path)
    size = request.path.stat().st_size
    print(f"{request.path}: the student ({request.epoch} weights), {size:,} bytes")
    print(f"checked on {len(batch)} test samples: logits differ by {difference:.1g} at most")
    print("\n".join(_how_to_load(request, directory, data, batch)))


def read_request(directory: Path, words: Sequence[str]) -> ExportRequest:
    """``[FILE] [format=state_dict|torch_export|onnx] [weights=last|best]``.

    The format follows from the file's ending where it is not given; without a file, the student
    goes into the run's directory.

    Raises:
        UserError: naming the word that cannot be read.
    """
    choices: dict[str, Sequence[str]] = {"format": FORMATS, "weights": tuple(EPOCHS)}
    chosen: dict[str, str] = {}
    files = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            files.append(word)
        elif key not in choices:
            raise UserError(f"{word}: export takes FILE, format= and weights=")
        elif value not in choices[key]:
            meant = nearest(value, choices[key])
            hint = f" Did you mean {meant}?" if meant else ""
            raise UserError(f"{word}: no such {key}.{hint} ({', '.join(choices[key])})")
        else:
            chosen[key] = value
    if len(files) > 1:
        raise UserError(f"{' '.join(files)}: export writes one file")
    epoch: Epoch = "best" if chosen.get("weights") == "best" else "last"
    suffix = Path(files[0]).suffix if files else SUFFIXES[chosen.get("format", "state_dict")][0]
    known = {ending: name for name, endings in SUFFIXES.items() for ending in endings}
    if suffix not in known:
        raise UserError(f"{files[0]}: must end in one of {', '.join(known)}")
    if chosen.get("format", known[suffix]) != known[suffix]:
        endings = " or ".join(SUFFIXES[chosen["format"]])
        raise UserError(f"{files[0]}: a file of format={chosen['format']} ends in {endings}")
    path = Path(files[0]) if files else directory / f"student{EPOCHS[epoch]}{suffix}"
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    return ExportRequest(known[suffix], path, epoch)


def _how_to_load(
    request: ExportRequest, directory: Path, data: DataModule, batch: Batch
) -> list[str]:
    shape = ", ".join(map(str, ("B", *batch.inputs.shape[1:])))
    kind = str(batch.inputs.dtype).removeprefix("torch.")
    inputs = f"# inputs: {kind} ({shape})"
    scale = data.preprocessing.normalisation
    if scale is not None and len(scale.mean) <= 4:
        mean, std = (
            [round(number, 4) for number in numbers] for numbers in (scale.mean, scale.std)
        )
        inputs += f" = (stored values / {scale.value_range:g} - {mean}) / {std}"
    elif scale is not None:
        inputs += ", standardised as the data set does"
    lines = {
        "state_dict": [
            "from kdrun.deployment import load_student",
            f'network = load_student("{directory}", "{request.epoch}")',
            "# or, in a network that you build yourself:",
            "# network.load_state_dict("
            + (
                f'safetensors.torch.load_file("{request.path}"))'
                if request.path.suffix == ".safetensors"
                else f'torch.load("{request.path}", weights_only=True))'
            ),
        ],
        "torch_export": [
            "import torch",
            f'network = torch.export.load("{request.path}").module()',
            "logits = network(inputs)",
        ],
        "onnx": [
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{request.path}")',
            '(logits,) = session.run(None, {"inputs": inputs})',
        ],
    }[request.format]
    return ["", *lines, inputs]
