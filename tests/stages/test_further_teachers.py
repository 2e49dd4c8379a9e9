"""A method or recipe may bring further networks, each with the options of ``teacher``."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.build import allowing
from kdrun.catalogue import Catalogue, is_further_network, is_group, open_catalogue
from kdrun.config import compose
from kdrun.errors import ConfigErrors, UserError
from kdrun.experiment import run_experiment
from kdrun.validation import check
from tests.tiny import WORDS

METHOD = """
defaults:
  - /model@_global_.second_teacher: small_cnn
  - override /recipe@_global_.recipe: two_teachers
_target_: tests.two_teachers.TwoTeachers
"""
RECIPE = """
defaults: [_self_, default]  # the stage here comes before the others
stages:
  second_teacher:
    _target_: kdrun.stages.train.TrainTeacher
    entry: second_teacher
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    for name, text in (("method/two_teachers", METHOD), ("recipe/two_teachers", RECIPE)):
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return open_catalogue([tmp_path / "conf"])


USES = ("method=two_teachers", "allow_packages=[tests]")


def test_a_further_teacher_at_chance_is_refused_by_its_own_name(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    words = (*USES, *WORDS, f"output_dir={tmp_path}", "second_teacher.widths=[2]")
    words = (*words, "teacher.allow_chance=true", "training.optimizer.lr=1e-9")
    config = compose(words, catalogue)
    with pytest.raises(UserError, match="second_teacher.allow_chance=true distils from it"):
        run_experiment(config.values, names=config.names, overrides=[], command=[])


def problems(catalogue: Catalogue, *words: str) -> list[str]:
    with pytest.raises(ConfigErrors) as refused:
        compose((*USES, *words), catalogue)
    return refused.value.problems


def test_what_counts_as_a_network() -> None:
    assert is_further_network("image_teacher") and is_group("image_teacher")
    assert not is_further_network("teacher") and not is_further_network("image_teacher.seed")


def test_a_further_network_has_the_options_of_the_teacher(catalogue: Catalogue) -> None:
    config = compose((*USES, "second_teacher.seed=3", "second_teacher.widths=[4,8]"), catalogue)
    node, teacher = config.values["second_teacher"], compose((), catalogue).values["teacher"]
    assert config.names["second_teacher"] == "small_cnn"
    assert node["seed"] == 3 and node["widths"] == [4, 8]
    shared = {"checkpoint", "mode", "weights", "cache", "reads", "allow_chance"}
    assert {key: node[key] for key in shared} == {key: teacher[key] for key in shared}
    chosen = compose((*USES, "second_teacher=mlp"), catalogue)
    assert chosen.names["second_teacher"] == "mlp"
    assert chosen.values["second_teacher"]["hidden"] == [256, 256]


def test_its_options_are_checked_like_the_teachers(catalogue: Catalogue) -> None:
    assert "Did you mean second_teacher=mlp?" in problems(catalogue, "second_teacher=mlpp")[0]
    assert problems(catalogue, "second_teacher.seed=-1") == [
        "second_teacher.seed: must be integer >= 0, got -1"
    ]
    assert "Did you mean second_teacher.widths?" in problems(catalogue, "second_teacher.width=1")[0]
    assert problems(catalogue, "second_teacher.finetune=true") == [
        "second_teacher.finetune: there are no weights to start from; give "
        "second_teacher.checkpoint"
    ]
    assert "second_teacher.cache" in problems(catalogue, "second_teacher.cache=logits")[0]


def test_a_network_that_nobody_asked_for_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigErrors) as refused:
        compose(("third_teacher=mlp",), open_catalogue())
    assert refused.value.problems == [
        "third_teacher: neither the method nor the recipe has such a network"
    ]


@pytest.mark.slow
def test_each_teacher_is_trained_once_and_shared(catalogue: Catalogue, tmp_path: Path) -> None:
    words = (*USES, *WORDS, f"output_dir={tmp_path}", "second_teacher.widths=[4,8]")
    results = {}
    for seed in (0, 1):
        config = compose((*words, f"seed={seed}"), catalogue)
        results[seed] = run_experiment(
            config.values, names=config.names, overrides=[], command=list(words)
        )
    first, second = (results[seed]["artefacts"] for seed in (0, 1))
    assert first["second_teacher"] == second["second_teacher"]
    assert first["second_teacher"] != first["teacher"]
    networks = results[0]["networks"]
    assert networks["second"]["parameters"] != networks["teacher"]["parameters"]
    assert networks["second"]["network"] == "small_cnn"
    with allowing(["tests"]):
        lines = check(config.values, config.names)
    assert any(line.startswith("second ") for line in lines)
