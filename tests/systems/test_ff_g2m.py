"""FF-G2M as a system: what its run shows, that it goes on after a kill, and its full scale."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean

import pytest
import torch

from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.deployment import load_student
from kdrun.errors import UserError
from kdrun.experiment import run_experiment
from kdrun.table.cells import layers, merge
from kdrun.table.config import open_table
from kdrun.validation import check
from tests.data.test_graph import NODES, WORDS, write_npz, write_planetoid
from tests.systems.killing import metrics_of, run_and_kill, weights
from tests.tiny import run

pytest.importorskip("torch_geometric", reason="the extra graph is not installed")

SHORT = ("method=ff_g2m", "teacher=gcn", "student=node_mlp", "training=graph_short")
SHORT += ("training.epochs=4", "teacher.allow_chance=true")


@pytest.fixture
def graph(tmp_path: Path, monkeypatch) -> None:
    """A small graph in the place of Cora."""
    write_planetoid(tmp_path / "data")
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path / "data"))


def test_by_itself_it_is_a_run_on_cora() -> None:
    config = compose(["method=ff_g2m"], open_catalogue())
    names = ("dataset", "teacher", "student", "training", "recipe")
    assert [config.names[name] for name in names] == [
        *("cora", "gcn", "node_mlp", "graph_short", "ff_g2m"),
    ]
    values = config.values
    assert values["student"]["reads"] == "x" and values["student"]["dropout"] == 0.6
    assert (values["teacher"]["weights"], values["teacher"]["cache"]) == ("best", "logits")
    typed = compose(["method=ff_g2m", "dataset=citeseer", "teacher=sage"], open_catalogue())
    assert (typed.names["dataset"], typed.names["teacher"]) == ("citeseer", "sage")
    assert typed.names["student"] == "node_mlp"


def test_a_run_and_what_it_leaves(graph, tmp_path: Path) -> None:
    result, directory = run(tmp_path, *SHORT)
    assert set(result["networks"]) == {"teacher", "alone", "distilled"}
    assert result["artefacts"]["teacher_outputs"]
    measured = result["frequencies"]
    assert set(measured) == {
        *("teacher", "alone/last", "alone/best", "distilled/last", "distilled/best"),
    }
    assert measured["teacher"]["difference_divergence"] == 0
    assert 0 < measured["distilled/last"]["high_share"] < 1
    # The student works without any edges.
    student = load_student(directory)
    with torch.no_grad():
        assert student(torch.rand(5, WORDS)).shape == (5, 2)


def test_the_teacher_is_run_once_for_all_nodes(graph, tmp_path: Path) -> None:
    """Distilling from recorded logits is distilling from the teacher itself."""
    cached, _ = run(tmp_path, *SHORT)
    live, _ = run(tmp_path, *SHORT, "teacher.cache=none")
    assert "teacher_outputs" not in live["artefacts"]
    for key in ("test_last", "test_best"):
        first, second = (each["networks"]["distilled"][key] for each in (cached, live))
        assert first == pytest.approx(second, rel=1e-4)


def test_the_mode_without_a_teacher_is_the_student_alone(graph, tmp_path: Path) -> None:
    result, _ = run(tmp_path, *SHORT, "method.mode=mlp")
    distilled, alone = (result["networks"][role]["test_last"] for role in ("distilled", "alone"))
    assert distilled == alone


def test_hidden_nodes_are_tested_on(graph, tmp_path: Path) -> None:
    words = ("dataset.setting=inductive", "dataset.hidden_fraction=0.5")
    result, directory = run(tmp_path, *SHORT, *words)
    log = (directory / "log.txt").read_text()
    assert f"{NODES - 5:,} samples under 1 augmentations" in log, "no logits of hidden nodes"
    accuracy = result["networks"]["distilled"]["test_last"]["accuracy"]
    assert accuracy == pytest.approx(20 * round(accuracy / 20)), "of five nodes"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.accumulate=2", r"trainer\.accumulate=2: each batch of this data set is all"),
        ("training.batch_size=100", r"set it to at least that"),
        ("dataset=digits", "reads nodes|reads=x"),
    ],
)
def test_what_cannot_be_is_one_line(graph, tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, *SHORT, word)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [pytest.param(10, id="in mid-phase"), pytest.param(9, id="between two phases")]
)
def test_killed_and_started_again(graph, tmp_path: Path, step: int) -> None:
    """Three trainings of four steps each; the ninth is the first of the student."""
    expected, _ = run(tmp_path / "whole", *SHORT)
    run_and_kill(tmp_path / "killed", SHORT, step=step, often=True)
    found, _ = run(tmp_path / "killed", *SHORT)
    assert metrics_of(found) == metrics_of(expected)
    assert found["frequencies"] == expected["frequencies"]
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(os.environ.get("KDRUN_DATA", "/nowhere"), "Planetoid", "Cora").is_dir(),
    reason="KDRUN_DATA holds no Planetoid/Cora",
)
def test_what_the_small_run_shows(tmp_path: Path) -> None:
    accuracy: dict[str, list[float]] = {}
    differences: dict[str, list[float]] = {}
    for seed in range(2):
        for mode in ("glnn", "full"):
            words = ("method=ff_g2m", "teacher=gcn", "student=node_mlp", "training=graph_short")
            words += (f"method.mode={mode}", f"seed={seed}", f"teacher.seed={seed}")
            result, _ = run(tmp_path, *words)
            networks = result["networks"]
            accuracy.setdefault("teacher", []).append(networks["teacher"]["test"]["accuracy"])
            accuracy.setdefault("alone", []).append(networks["alone"]["test_best"]["accuracy"])
            accuracy.setdefault(mode, []).append(networks["distilled"]["test_best"]["accuracy"])
            measured = result["frequencies"]["distilled/best"]["difference_divergence"]
            differences.setdefault(mode, []).append(measured)
    means = {name: mean(values) for name, values in accuracy.items()}
    assert 78 < means["teacher"] < 84 and 50 < means["alone"] < 62
    assert means["glnn"] > means["alone"] + 12 and means["full"] > means["alone"] + 12
    assert mean(differences["full"]) < mean(differences["glnn"])


# -- full scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["gcn", "gat", "sage"])
def test_a_step_at_full_scale_on_stand_ins(tmp_path: Path, monkeypatch, teacher: str) -> None:
    """A cell of the paper's table on a small graph, with narrow networks of the same classes."""
    write_npz(tmp_path / "data")
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path / "data"))
    table = open_table("ff_g2m", open_catalogue())
    column = next(c for c in table.columns if c.label == f"Photo {teacher.upper()}")
    words = {w.partition("=")[0]: w for w in merge(layers(table, table.row("full"), column, None))}
    small = ("teacher.hidden=8", "student.hidden=[8,8]", "dataset.test_nodes=20", "dry=true")
    small += ("dataset.validation_nodes=10", "dataset.per_class=5", "trainer.progress=off")
    small += (f"output_dir={tmp_path}", "trainer=cpu")
    words |= {word.partition("=")[0]: word for word in small}
    config = compose(list(words.values()), open_catalogue())
    assert config.values["teacher"]["layers"] == 3 and config.values["training"]["epochs"] == 500
    assert any(line.startswith("student") for line in check(config.values, config.names))
    result = run_experiment(config.values, names=config.names, overrides=[], command=[])
    shares = result["networks"]["distilled"]["training"]["gradient_shares"]
    assert set(shares) == {"supervised", "low_frequency", "high_frequency"}
