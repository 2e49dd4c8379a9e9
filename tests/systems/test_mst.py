"""MST-Distill as a system: its phases, what they share and leave alone, kills, its full scale."""

from __future__ import annotations

import copy
import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kdrun.stages.distil
import kdrun.stages.specialise
from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.deployment import evaluate_run
from kdrun.distiller import Distiller
from kdrun.errors import Interrupted, UserError
from kdrun.experiment import run_experiment
from kdrun.files import read_json
from kdrun.layers.masks import SpecialisedTeacher
from kdrun.losses.divergence import kl_divergence
from kdrun.stages.training import train
from kdrun.validation import check
from tests.spoken import write_av_mnist, write_spoken_digits
from tests.systems.killing import metrics_of, run_and_kill, weights
from tests.tiny import identical, run, state_of

pytest.importorskip("soundfile")

NETWORKS = (
    *("student=small_cnn", "student.reads=audio", "student.widths=[4,6,9]"),
    *("aux_teacher=small_cnn", "aux_teacher.reads=image", "aux_teacher.widths=[4,6,9]"),
    *("teacher=digit_fusion", "teacher.widths=[4,4]", "teacher.hidden=[12,9]"),
)
WORDS = (
    *("method=mst", "method.mask_reduction=1", *NETWORKS, "training=spoken_digits"),
    *("dataset.train_pairs=50", "dataset.validation_pairs=20", "training.batch_size=16"),
    *("training.epochs=3", "recipe.stages.cotrain.epochs=1", "recipe.stages.specialise.epochs=2"),
)
"""Steps of the phases: co-training 4, alone 12, specialisation 8, distillation 8."""


@pytest.fixture
def words(tmp_path: Path, monkeypatch) -> tuple[str, ...]:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    folder = write_spoken_digits(tmp_path / "set")
    return (*WORDS, f"dataset.name={folder}")


def test_by_itself_it_is_a_run_on_digits_seen_and_heard() -> None:
    config = compose(["method=mst"], open_catalogue())
    chosen = {"dataset": "spoken_digits", "teacher": "digit_fusion", "student": "digit_audio_cnn"}
    chosen |= {"aux_teacher": "digit_image_cnn", "training": "spoken_digits", "recipe": "mst"}
    assert chosen.items() <= config.names.items()
    reads = [config.values[role]["reads"] for role in ("teacher", "student", "aux_teacher")]
    assert reads == [None, "audio", "image"]
    other = ("student=digit_image_cnn", "aux_teacher=digit_audio_cnn", "training.epochs=4")
    config = compose(["method=mst", *other], open_catalogue())
    assert config.values["student"]["reads"] == "image", "the other direction"
    assert config.values["aux_teacher"]["reads"] == "audio"
    assert config.values["training"]["epochs"] == 4


# -- what the phases do and leave alone ------------------------------------------------------------


class Watched:
    """Stands for ``train``: notes what the phases start from and that frozen things stay."""

    def __init__(self) -> None:
        self.assemblies, self.judged = {}, {}

    def __call__(self, context, assembly, **options):
        name = options["name"]
        self.assemblies[name] = copy.deepcopy(assembly)
        self.judged[name] = (context.task.objective, context.task.direction)
        trained = {"student", *assembly.method.trainable_roles}
        networks = {"student": assembly.student, **assembly.teachers}
        frozen = [network for role, network in networks.items() if role not in trained]
        frozen += [n.teacher for n in networks.values() if isinstance(n, SpecialisedTeacher)]
        before = [state_of(network) for network in frozen]
        hooks = [hooks_of(network) for network in frozen]
        outcome = train(context, assembly, **options)
        for network, state, count in zip(frozen, before, hooks, strict=True):
            assert identical(state_of(network), state), name
            assert hooks_of(network) == count, name
        return outcome


def hooks_of(network: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.fixture
def watched(monkeypatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(kdrun.stages.specialise, "train", watched)
    monkeypatch.setattr(kdrun.stages.distil, "train", watched)
    return watched


def test_each_phase_trains_its_part_and_nothing_else(
    tmp_path: Path, words: tuple[str, ...], watched: Watched
) -> None:
    result, directory = run(tmp_path, *words)
    assert list(watched.assemblies) == ["cotrain", "specialise", "distil"]
    store = tmp_path / "store"
    cotrained = load_file(store / result["artefacts"]["cotrain"] / "student.safetensors")
    third = watched.assemblies["distil"]
    assert identical(state_of(third.student), cotrained), "it goes on, from where phase 1 ended"
    # The masks that phase 3 uses are those of the best epoch of phase 2.
    masks = load_file(store / result["artefacts"]["specialise"] / "specialists_best.safetensors")
    for name, specialist in third.teachers.items():
        own = {f"masks.{name}.{key}": value for key, value in specialist.mask.state_dict().items()}
        assert own and all(torch.equal(masks[key], value) for key, value in own.items())
    best = {"cotrain": ("accuracy", "max"), "specialise": ("kl", "min"), "distil": ("loss", "min")}
    assert watched.judged == best
    # What the run shows.
    networks = result["networks"]
    assert set(networks) == {"teacher", "aux_teacher", "cotrained", "alone", "distilled"}
    assert networks["distilled"]["training"]["epochs"] == 2
    assert networks["alone"]["training"]["epochs"] == 3
    names = {"teacher_1", "teacher_2", "aux_teacher_1", "aux_teacher_2"}
    assert set(result["specialists"]) == names
    for epoch in ("first", "last"):
        shares = [entry["share"][epoch] for entry in result["specialists"].values()]
        assert sum(shares) == pytest.approx(1)
    assert all(entry["spread"] > 0 for entry in result["specialists"].values())
    with (directory / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file)))
    assert {f"share_{name}" for name in names} | {"teachers_supervised"} <= columns
    said = (directory / "log.txt").read_text()
    assert "KL masked" in said and "aux_teacher_2" in said
    # And what a later command shows of it.
    evaluate_run(directory, [], open_catalogue())
    again = read_json(directory / "eval-spoken_digits.json")["networks"]
    assert set(again) == set(networks)
    for role, entry in again.items():
        assert entry.items() <= networks[role].items()


@pytest.mark.slow
def test_every_mask_is_trained_as_by_an_optimiser_of_its_own(
    tmp_path: Path, words: tuple[str, ...], watched: Watched
) -> None:
    result, _ = run(tmp_path, *words, "recipe.stages.specialise.epochs=1")
    assembly = watched.assemblies["specialise"]
    config = compose([*words, "trainer=cpu"], open_catalogue()).values
    data = kdrun.experiment.prepare_data(config)[0]
    target = assembly.teachers.pop("target").eval()
    specialists = {"teacher_1": assembly.student, **assembly.teachers}
    for name, specialist in specialists.items():
        specialist.train()
        optimizer = torch.optim.Adam(specialist.parameters(), 1e-3)
        for batch in data.train(batch_size=16, seed=0, device="cpu"):
            with torch.no_grad():
                approached = target(**batch.inputs)
            loss = kl_divergence(
                specialist(**batch.inputs), approached, temperature=4.0, t_squared=True
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        folder = tmp_path / "store" / result["artefacts"]["specialise"]
        found = load_file(folder / "specialists.safetensors")
        for key, value in specialist.mask.state_dict().items():
            assert torch.allclose(found[f"masks.{name}.{key}"], value, atol=1e-6), key


@pytest.mark.slow
def test_runs_that_route_otherwise_share_the_first_phases(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    results = [
        run(tmp_path, *words, *other)[0]
        for other in ((), ("method.k=4",), ("method.lb_mode=CV",), ("method.layers=1",))
    ]
    artefacts = [result["artefacts"] for result in results]
    assert len({names["cotrain"] for names in artefacts}) == 1
    assert len({names["specialise"] for names in artefacts[:3]}) == 1
    assert artefacts[3]["specialise"] != artefacts[0]["specialise"], "other masks"
    plain, _ = run(tmp_path, *words, "method.masks=false")
    assert "specialise" not in plain["artefacts"]
    assert set(plain["specialists"]) == {"teacher", "aux_teacher"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method.k=5", "k=5: there are 4 specialised teachers"),
        ("method.aux_layers=[fc9]", "no sub-module fc9 in SmallCNN"),
        ("method.mask_heads=20", "too narrow for 20 heads"),
        ("recipe.stages.specialise=null", "trains the masks: .* method.masks=false"),
        ("recipe.stages.cotrain.epochs=3", "leaves nothing of training.epochs=3"),
        ("student.reads=sound", "reads=sound: a sample of this data set has image, audio"),
        ("method=kd", "no stage teacher|go with method=mst"),
    ],
)
def test_what_cannot_work_is_told_before_any_training(
    tmp_path: Path, words: tuple[str, ...], word: str, said: str, monkeypatch
) -> None:
    monkeypatch.setattr(Distiller, "_step", lambda *_: pytest.fail("a step was taken"))
    if word == "method=kd":
        words = (*(w for w in words if not w.startswith("method")), "recipe=mst")
    with pytest.raises(UserError, match=said):
        run(tmp_path, *words, word)


# -- going on after an interruption ----------------------------------------------------------------

BEGINS = {"cotrain": 1, "alone": 5, "specialise": 17, "distil": 25}
"""Number of the first step of each training."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "often"),
    [
        pytest.param(BEGINS["cotrain"] + 2, True, id="in co-training"),
        pytest.param(BEGINS["specialise"], False, id="before specialisation"),
        pytest.param(BEGINS["specialise"] + 5, True, id="in specialisation"),
        pytest.param(BEGINS["specialise"] + 6, False, id="losing an epoch of masks"),
        pytest.param(BEGINS["distil"], False, id="before distillation"),
        pytest.param(BEGINS["distil"] + 5, True, id="in distillation"),
    ],
)
def test_killed_and_started_again(
    tmp_path: Path, words: tuple[str, ...], step: int, often: bool
) -> None:
    expected, _ = run(tmp_path / "whole", *words)
    run_and_kill(tmp_path / "killed", words, step=step, often=often)
    found, _ = run(tmp_path / "killed", *words)
    assert metrics_of(found) == metrics_of(expected)
    assert found["specialists"] == expected["specialists"]
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["cotrain", "specialise", "distil"])
def test_asked_to_end_in_a_phase_and_continued(
    tmp_path: Path, words: tuple[str, ...], phase: str, monkeypatch
) -> None:
    expected, _ = run(tmp_path / "whole", *words)
    taken, take_step = [0], Distiller._step

    def counting(distiller: Distiller, batch) -> None:
        taken[0] += 1
        if taken[0] == BEGINS[phase] + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(distiller, batch)

    monkeypatch.setattr(Distiller, "_step", counting)
    with pytest.raises(Interrupted):
        run(tmp_path / "ended", *words)
    assert taken[0] == BEGINS[phase] + 1
    found, _ = run(tmp_path / "ended", *words)
    assert metrics_of(found) == metrics_of(expected)
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")


# -- full scale ------------------------------------------------------------------------------------

FULL = ("method=mst", "recipe=mst_avmnist", "trainer=cpu", "trainer.progress=off")
STAND_INS = (
    *("teacher.image_widths=[2,3,4]", "teacher.image_features=6", "teacher.hidden=12"),
    *("teacher.audio_widths=[2,2,2,2,6]", "student.widths=[2,6,6]"),
    *("aux_teacher.widths=[2,3,6]", "aux_teacher.hidden=6", "method.mask_reduction=1"),
)


@pytest.fixture
def av_mnist(tmp_path: Path) -> Callable[..., object]:
    folder = write_av_mnist(tmp_path / "avmnist")

    def make(*words: str) -> object:
        place = (f"dataset.name={folder}", f"output_dir={tmp_path / 'out'}")
        return compose([*FULL, *place, *words], open_catalogue())

    return make


def test_the_papers_recipe(av_mnist) -> None:
    config = av_mnist()
    values = config.values
    chosen = {"teacher": "avmnist_fusion", "student": "avmnist_audio"}
    assert (chosen | {"aux_teacher": "avmnist_image"}).items() <= config.names.items()
    training, stages = values["training"], values["recipe"]["stages"]
    assert training["optimizer"] == {"_target_": "torch.optim.Adam", "lr": 1e-4}
    assert (training["epochs"], training["batch_size"]) == (101, 512)
    assert (stages["cotrain"]["epochs"], stages["specialise"]["epochs"]) == (1, 1)
    method = values["method"]
    assert (method["temperature"], method["layers"], method["k"]) == (4.0, 2, 1)


@pytest.mark.slow
def test_the_papers_recipe_is_valid(av_mnist) -> None:
    config = av_mnist()
    lines = "\n".join(check(config.values, config.names))
    assert "aux_teacher" in lines and "avmnist_fusion" in lines


@pytest.mark.slow
def test_a_step_at_full_scale_on_stand_ins(av_mnist) -> None:
    config = av_mnist(*STAND_INS, "dry=true")
    result = run_experiment(config.values, names=config.names, overrides=[], command=[])
    assert set(result["networks"]) >= {"teacher", "aux_teacher", "cotrained", "distilled"}
    layers = [entry["layer"] for entry in result["specialists"].values()]
    assert layers == ["concat", "fc1", "layers.conv3", "layers.fc1"]
