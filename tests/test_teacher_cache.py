"""Recorded teachers: the same outputs, the same training, and refusals where they would not be."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from kdrun import distiller as distiller_module
from kdrun import recording as recording_module
from kdrun.assembly import Assembly, assemble, make_method
from kdrun.build import instantiate
from kdrun.checkpoints import load_weights
from kdrun.data.loader import AugmentationCycle
from kdrun.data.module import DataModule
from kdrun.errors import Interrupted, UserError
from kdrun.experiment import run_experiment
from kdrun.files import read_json
from kdrun.forward import run_network
from kdrun.losses.divergence import kl_divergence
from kdrun.methods.kd import KD
from kdrun.outputs import Batch, HeadLogits, ModelOutput
from kdrun.recording import Dense, Recording, TopK, array_path
from kdrun.stages import record as record_module
from kdrun.stages.recorded import refuse_unrecordable
from tests.tiny import run, small_cnn, task, tiny_config

EPOCHS = 2
WORDS = (
    "teacher=small_cnn",
    "student=mlp",
    f"training.epochs={EPOCHS}",
    "teacher.allow_chance=true",
    "dataset.augmentation.crop_padding=1",
)
SAMPLES = 1102


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One store for the tests of this file: teacher and student alone are trained once."""
    return tmp_path_factory.mktemp("outputs")


def cached(root: Path, *words: str) -> tuple[dict[str, Any], Path]:
    chosen = {word.partition("=")[0]: word for word in (*WORDS, "teacher.cache=logits", *words)}
    return run(root, *chosen.values())


def recording_of(root: Path, result: dict[str, Any]) -> Path:
    return root / "store" / result["artefacts"]["teacher_outputs"]


def rebuilt(root: Path, result: dict[str, Any], *words: str) -> tuple[DataModule, Assembly]:
    """The run's data, and its method with the teacher that it had."""
    config = tiny_config(root, *WORDS, *words).values
    data = instantiate(config["dataset"])
    data.prepare()
    teacher = instantiate(
        {k: v for k, v in config["teacher"].items() if k in ("_target_", "widths")},
        num_classes=10,
        in_channels=1,
    )
    weights = root / "store" / result["artefacts"]["teacher"] / "network.safetensors"
    load_weights(teacher, weights)
    method = make_method(config["method"])
    fitting = {"task": task(), "data": data, "seed": 0}
    return data, assemble(method, small_cnn(0), {"teacher": teacher.eval()}, **fitting)


def opened(directory: Path, encoding, views=(), length: int = 2) -> Recording:
    expected = read_json(directory / "recording.json")
    cycle = AugmentationCycle(seed=0, length=length)
    return Recording(directory, encoding, views=views, cycle=cycle, expected=expected)


def losses(directory: Path) -> list[dict[str, float]]:
    """The logged loss terms of every epoch."""
    with (directory / "metrics.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if name.startswith("loss")}
            for row in csv.DictReader(file)
        ]


# -- what is recorded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "cache"), [("kd", "logits"), ("mlld", "logits"), ("fitnet", "features")]
)
def test_every_sample_of_every_augmentation_equals_the_live_teacher(root, method, cache) -> None:
    words = (f"method={method}", f"teacher.cache={cache}", "teacher.cache_views=2")
    words = (*words, "student=small_cnn")
    result, _ = cached(root, *words)
    data, assembly = rebuilt(root, result, f"method={method}")
    taps, views = assembly.taps.get("teacher"), assembly.method.views
    encoding = Dense(torch.float16, taps.names if taps else ())
    recording = opened(recording_of(root, result), encoding, views)
    loader = data.train(
        batch_size=128, seed=5, device="cpu", views=views, cycle=AugmentationCycle(0, 2)
    )
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for epoch in range(4):
        loader.set_epoch(epoch)
        for batch in loader:
            with torch.no_grad():
                live = run_network(task(), assembly.teachers["teacher"], batch, taps, views)
            kept = recording(batch)
            pairs = [(kept, live), *((kept.views[name], live.views[name]) for name in views)]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours.logits, theirs.logits, rtol=2**-10, atol=2e-3)
                for name in encoding.features:
                    torch.testing.assert_close(
                        ours.features[name], theirs.features[name], rtol=2**-10, atol=2e-3
                    )
            assert kept.logits.dtype == torch.float32
            seen[batch.augmentation] |= set(batch.index.tolist())
    assert len(seen[0]) == len(seen[1]) == SAMPLES
    first, second = (np.load(array_path(recording.directory, "inputs.logits", n)) for n in (0, 1))
    assert np.abs(first - second).max() > 0.5  # The augmentations are different ones.


def test_files_are_compact(root) -> None:
    header = 128
    logits = recording_of(root, cached(root)[0])
    assert array_path(logits, "inputs.logits", 0).stat().st_size == header + SAMPLES * 10 * 2
    assert array_path(logits, "index", 0).stat().st_size == header + SAMPLES * 8
    top = recording_of(root, cached(root, "teacher.cache=topk", "teacher.cache_top_k=3")[0])
    values, ids = (array_path(top, f"inputs.{name}", 0) for name in ("log_probabilities", "ids"))
    assert values.stat().st_size == header + SAMPLES * (3 + 1) * 2
    assert ids.stat().st_size == header + SAMPLES * 3 * 2
    assert isinstance(np.load(values, mmap_mode="r"), np.memmap)


def test_the_size_is_said_before_anything_is_written(root, monkeypatch) -> None:
    _, directory = cached(root, "teacher.cache_views=2", "teacher.cache_seed=5")
    size = 2 * SAMPLES * 10 * 2 / 1024
    said = f"teacher_outputs: logits of 1,102 samples under 2 augmentations, {size:.1f} KiB"
    assert said in (directory / "log.txt").read_text()
    monkeypatch.setattr(
        recording_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 99)
    )
    with pytest.raises(UserError, match=r"takes 21\.5 KiB, but .* has 99 B left; lower teacher"):
        cached(root, "teacher.cache_seed=3")


def test_an_interrupted_recording_goes_on(root, monkeypatch) -> None:
    words = ("teacher.cache_views=2", "teacher.cache_seed=11")
    directory = recording_of(root, cached(root, *words)[0])
    first, second = (array_path(directory, "inputs.logits", number) for number in (0, 1))
    written, expected = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    (directory / "artefact.json").unlink()
    # No more room than for what is missing.
    room = shutil._ntuple_diskusage(1, 1, SAMPLES * 10 * 2)
    monkeypatch.setattr(recording_module.shutil, "disk_usage", lambda _: room)
    cached(root, *words, "rerun=true")
    assert first.stat().st_mtime_ns == written
    assert second.read_bytes() == expected


@pytest.mark.parametrize("left", [0, 100, 1000])
def test_what_an_interrupted_recording_left_torn_is_written_again(root, left: int) -> None:
    words = ("teacher.cache_seed=12",)
    directory = recording_of(root, cached(root, *words)[0])
    for name in ("index", "inputs.logits"):
        path = array_path(directory, name, 0)
        expected = path.read_bytes()
        path.write_bytes(expected[:left])
        (directory / "artefact.json").unlink()
        cached(root, *words, "rerun=true")
        assert path.read_bytes() == expected


@pytest.mark.parametrize("form", ["teacher.precision=bf16", "teacher.fold=true"])
def test_a_cheaper_teacher_has_a_recording_of_its_own(root, form: str) -> None:
    exact, _ = cached(root)
    cheaper, directory = cached(root, form)
    files = [array_path(recording_of(root, r), "inputs.logits", 0) for r in (exact, cheaper)]
    assert files[0] != files[1]
    ours, theirs = (np.load(file).astype(np.float32) for file in files)
    assert 0 < np.abs(ours - theirs).max() < 2**-5 * np.abs(theirs).max()
    assert "it agrees with its exact self" in (directory / "log.txt").read_text()


def test_few_labelled_samples_that_are_drawn_with_replacement(root) -> None:
    """Only those are recorded, and one that is drawn twice looks the same both times."""
    words = (
        *("dataset=digits_few_shot", "dataset.shots=3", "dataset.steps=2"),
        *("dataset.data.augmentation.crop_padding=1", "teacher.cache_views=2"),
    )
    chosen = [word for word in WORDS if word != "dataset.augmentation.crop_padding=1"]
    result, _ = run(root, *chosen, *words, "teacher.cache=logits")
    config = tiny_config(root, *chosen, *words).values
    data = instantiate(config["dataset"])
    data.prepare()
    recording = opened(recording_of(root, result), Dense(torch.float16))
    teacher = rebuilt(root, result)[1].teachers["teacher"]
    loader = data.train(batch_size=64, seed=0, device="cpu", cycle=AugmentationCycle(0, 2))
    for epoch in range(4):
        loader.set_epoch(epoch)
        for batch in loader:
            assert len(batch.index.unique()) <= 30 < len(batch)
            with torch.no_grad():
                live = run_network(task(), teacher, batch)
            kept = recording(batch)
            torch.testing.assert_close(kept.logits, live.logits, rtol=2**-10, atol=2e-3)
    run(root, *chosen, *words, "teacher.cache=logits", "dry=true")


# -- top k -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 8.0, 60.0])
def test_the_mass_of_top_k_sums_to_one(scale: float) -> None:
    torch.manual_seed(0)
    logits = scale * torch.randn(64, 100)
    encoding = TopK(5, 100, torch.float16)
    arrays = encoding.encode(ModelOutput(logits))
    assert arrays["ids"].dtype == torch.int16 and arrays["ids"].shape == (64, 5)
    again = encoding.decode(arrays, torch.float32).logits
    torch.testing.assert_close(again.exp().sum(-1), torch.ones(64))
    p, q = logits.double().softmax(-1), again.double().softmax(-1)
    top = logits.topk(5).indices
    torch.testing.assert_close(q.gather(-1, top), p.gather(-1, top), rtol=2e-2, atol=1e-3)
    others = torch.ones(64, 100, dtype=torch.bool).scatter(-1, top, False)
    rest = (p * others).sum(-1)
    spread = q[others].view(64, 95)
    assert torch.equal(spread.amax(-1), spread.amin(-1))
    torch.testing.assert_close(spread.sum(-1), rest, rtol=2e-2, atol=1e-3)


def test_the_divergence_of_top_k_is_the_mass_times_what_is_lost_within_it() -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(64, 30, dtype=torch.float64)
    encoding = TopK(4, 30, torch.float64)
    again = encoding.decode(encoding.encode(ModelOutput(logits)), torch.float64).logits
    divergence = F.kl_div(again, logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    tail = logits.sort(-1, descending=True).values[:, 4:].log_softmax(-1)
    rest = 1 - logits.softmax(-1).topk(4).values.sum(-1)
    entropy = -(tail.exp() * tail).sum(-1)
    torch.testing.assert_close(divergence, rest * (math.log(26) - entropy))


def test_the_divergence_from_two_kept_classes_by_hand() -> None:
    """The student thinks the rest equally likely, so all that is known of the rest is its mass."""
    teacher = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    student = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    encoding = TopK(2, 4, torch.float32)
    kept = encoding.decode(encoding.encode(ModelOutput(teacher)), torch.float32).logits
    assert kl_divergence(student, teacher, t_squared=False).item() == pytest.approx(
        0.467912, abs=1e-6
    )
    assert kl_divergence(student, kept, t_squared=False).item() == pytest.approx(0.461634, abs=1e-6)


def test_top_k_of_all_classes_but_one_loses_nothing() -> None:
    logits = torch.randn(8, 10)
    encoding = TopK(9, 10, torch.float32)
    again = encoding.decode(encoding.encode(ModelOutput(logits)), torch.float32).logits
    torch.testing.assert_close(again, logits.log_softmax(-1), atol=1e-5, rtol=1e-5)


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "cache"),
    [
        ("kd", "logits"),
        ("mlld", "logits"),
        ("fitnet", "features"),
        ("simkd", "features"),
        pytest.param("crd", "features", marks=pytest.mark.slow),
        pytest.param("catkd", "features", marks=pytest.mark.slow),
    ],
)
def test_the_loss_curve_is_that_of_the_live_teacher(root, method: str, cache: str) -> None:
    chosen = [f"method={method}", "student=small_cnn"]
    if method == "crd":
        chosen.append("method.negatives=32")
    live = losses(cached(root, *chosen, "teacher.cache=none")[1])
    full = ("teacher.cache_dtype=fp32", f"teacher.cache_views={EPOCHS}")
    recorded = losses(cached(root, *chosen, f"teacher.cache={cache}", *full)[1])
    assert len(live) == EPOCHS
    for ours, theirs in zip(recorded, live, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_half_precision_and_top_k_stay_near(root) -> None:
    live = losses(cached(root, "teacher.cache=none")[1])
    views = f"teacher.cache_views={EPOCHS}"
    half = losses(cached(root, views)[1])
    top = losses(cached(root, views, "teacher.cache=topk", "teacher.cache_top_k=6")[1])
    for row, approximate, reference in zip(half, top, live, strict=True):
        assert row == pytest.approx(reference, rel=1e-3)
        assert approximate["loss"] == pytest.approx(reference["loss"], rel=0.3)


def test_other_students_methods_and_seeds_share_one_recording(root, monkeypatch) -> None:
    first, _ = cached(root)

    def never(*_: object) -> None:
        raise AssertionError("recorded again")

    run_networks = set()

    def noting(task, network, *rest):
        run_networks.add(type(network).__name__)
        return run_network(task, network, *rest)

    monkeypatch.setattr(record_module, "write_augmentation", never)
    monkeypatch.setattr(distiller_module, "run_network", noting)
    for words in (["student=resnet8"], ["method=dkd", "seed=1"]):
        other, directory = cached(root, *words)
        assert other["artefacts"]["teacher_outputs"] == first["artefacts"]["teacher_outputs"]
        assert "teacher_outputs: found in the store" in (directory / "log.txt").read_text()
    assert run_networks == {"MLP", "ResNet"}


def test_a_stop_within_an_epoch_then_the_same_command_again(root, tmp_path, monkeypatch) -> None:
    words = ("teacher.cache_views=2",)
    whole = cached(root, *words, "rerun=true")[1]

    def stop(self: KD, progress) -> None:
        if progress.step == 22:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(KD, "after_step", stop)
        with pytest.raises(Interrupted):
            cached(tmp_path, *words)
    stopped = cached(tmp_path, *words)[1]
    assert "continuing at epoch 2 of 2, step 5 of 18" in (stopped / "log.txt").read_text()
    first, second = (load_file(d / "student.safetensors") for d in (whole, stopped))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_accumulation_reads_the_same_rows(root) -> None:
    words = ("trainer.accumulate=2", "teacher.cache_dtype=fp32", f"teacher.cache_views={EPOCHS}")
    live = losses(cached(root, "trainer.accumulate=2", "teacher.cache=none")[1])
    for ours, theirs in zip(losses(cached(root, *words)[1]), live, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_trial_records_only_what_it_needs(tmp_path) -> None:
    result, _ = cached(tmp_path, "dry=true", "teacher.cache_views=2")
    assert "teacher_outputs" in result["artefacts"]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("teacher", "network/0123456789abcdef"),
        ("data and transform", "0123"),
        ("augmentation seed", 7),
        ("precision", "bf16"),
        ("taps", ["stage1"]),
    ],
)
def test_a_recording_of_something_else_is_refused(root, entry: str, value) -> None:
    directory = recording_of(root, cached(root)[0])
    expected = read_json(directory / "recording.json")
    fitting = {"views": (), "cycle": AugmentationCycle(0, 1)}
    Recording(directory, Dense(torch.float16), expected=expected, **fitting)
    with pytest.raises(UserError) as refused:
        Recording(directory, Dense(torch.float16), expected=expected | {entry: value}, **fitting)
    assert f"{entry} is {value}, recorded was {expected[entry]}" in str(refused.value)


@pytest.mark.parametrize(
    "word",
    ["dataset.augmentation.crop_padding=2", "dataset.val_fraction=0.2", "teacher.seed=4"],
)
def test_other_transform_other_data_or_other_teacher_is_recorded_anew(root, word: str) -> None:
    first, other = cached(root)[0], cached(root, word)[0]
    assert first["artefacts"]["teacher_outputs"] != other["artefacts"]["teacher_outputs"]


def test_outputs_of_another_transform_are_found_by_running_the_teacher(root) -> None:
    """As if the code of the augmentation had changed under an old recording."""
    words = ("teacher.cache_seed=21",)
    other = recording_of(root, cached(root, "teacher.cache_seed=22")[0])
    directory = recording_of(root, cached(root, *words)[0])
    for path in other.glob("inputs.*.npy"):
        shutil.copy(path, directory / path.name)
    # Its checksum may be looked at too; here the arrays themselves must be found wrong.
    marker = json.loads((directory / "artefact.json").read_text())
    marker["files"] = {}
    (directory / "artefact.json").write_text(json.dumps(marker))
    with pytest.raises(UserError, match="do not belong to this run's batches: inputs.logits of"):
        cached(root, *words, "rerun=true")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["method=fitnet", "student=small_cnn"],
            "teacher.cache=logits: FitNet reads .* set teacher.cache=features",
        ),
        (["method=dml"], "teacher.cache=logits: DML has no frozen teacher; set it to none"),
        (
            ["teacher.cache=topk", "teacher.cache_top_k=10"],
            "teacher.cache_top_k=10: the data set has 10 classes; lower it",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path, words, said) -> None:
    with pytest.raises(UserError, match=said):
        cached(tmp_path, *words)
    # Before the teacher is trained.
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("encoding", [Dense(torch.float32), TopK(2, 4, torch.float32)])
def test_logits_that_were_not_computed_are_recorded_all_the_same(encoding) -> None:
    lazy = HeadLogits(torch.randn(2, 3, 5), torch.randn(4, 5), None, chunk=2)
    of_lazy, of_dense = (encoding.encode(ModelOutput(x)) for x in (lazy, lazy.dense()))
    assert of_lazy.keys() == of_dense.keys()
    assert all(torch.equal(of_lazy[name], of_dense[name]) for name in of_dense)


def test_a_recipe_that_does_not_record_is_refused(root) -> None:
    config = tiny_config(root, *WORDS, "teacher.cache=logits")
    values = copy.deepcopy(config.values)
    del values["recipe"]["stages"]["teacher_outputs"]
    with pytest.raises(UserError, match="does not record the teacher; give it a stage teacher_"):
        run_experiment(values, names=config.names, overrides=[], command=[])


class Mixing(KD):
    def augment(self, batch: Batch) -> Batch:
        return batch


class Irregular(KD):
    irregular = True


@pytest.mark.parametrize(
    ("method", "said"), [(Mixing, "changes the batches"), (Irregular, "in steps of its own")]
)
def test_methods_that_make_their_own_batches_are_refused(method, said) -> None:
    with pytest.raises(UserError, match=said):
        refuse_unrecordable({"cache": "logits"}, method(), 10)


def test_values_beyond_half_precision_are_refused() -> None:
    output = ModelOutput(torch.full((2, 3), 1e5))
    with pytest.raises(UserError, match=r"reach 1e\+05, beyond .* teacher.cache_dtype=fp32"):
        Dense(torch.float16).encode(output)
    assert Dense(torch.float32).encode(output)["logits"].max() == 1e5


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("encoding", [Dense(torch.float32), TopK(1, 3, torch.float32)])
def test_values_that_are_not_finite_are_refused(encoding, value: float) -> None:
    with pytest.raises(UserError, match="gives outputs that are not finite"):
        encoding.encode(ModelOutput(torch.tensor([[0.0, value, 1.0]])))
