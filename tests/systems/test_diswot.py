"""DisWOT as a system: what is found becomes the student, it goes on after a kill, full scale."""

from __future__ import annotations

import csv
import os
import re
import signal
import sys
import traceback
from pathlib import Path

import pytest
import yaml

from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.deployment import load_student
from kdrun.errors import UserError
from kdrun.evaluation import parameter_count
from kdrun.experiment import run_experiment
from kdrun.stages.search import FOUND, HISTORY, Search
from kdrun.validation import check
from tests.systems.killing import metrics_of, run_and_kill, weights
from tests.tiny import run

PLACE = "recipe.stages.search"
SHORT = ("method=diswot", "dataset=digits", "teacher=resnet20_half", "student=resnet8_half")
SHORT += ("recipe=diswot", "training=smoke", "teacher.allow_chance=true")
SHORT += (f"{PLACE}.evaluations=14", f"{PLACE}.scorer.batch_size=16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[dict, Path]:
    return run(root, *SHORT)


def history(root: Path, result: dict) -> list[dict[str, str]]:
    path = root / "store" / result["artefacts"]["search"] / HISTORY
    with path.open() as file:
        return list(csv.DictReader(file))


def test_by_itself_it_is_a_run_on_small_networks() -> None:
    config = compose(["method=diswot"], open_catalogue())
    names = ("dataset", "teacher", "student", "training", "recipe")
    assert [config.names[name] for name in names] == [
        *("cifar10_5k", "resnet20_half", "resnet8_half", "cifar_minute", "diswot"),
    ]
    search = config.values["recipe"]["stages"]["search"]
    assert search["evaluations"] == 20 and search["max_parameters"] == 60_000
    assert list(config.values["recipe"]["stages"])[:2] == ["search", "teacher"]


@pytest.mark.slow
def test_what_is_found_is_the_student(root: Path, finished) -> None:
    result, directory = finished
    rows = history(root, result)
    assert len(rows) == 14 and all(float(row["parameters"]) <= 60_000 for row in rows)
    scores = [float(row["semantic"]) + float(row["relation"]) for row in rows]
    best = rows[scores.index(max(scores))]
    assert result["search"]["words"] == best["words"]
    assert best["words"].startswith("student.blocks=[")
    for role in ("alone", "distilled"):
        assert result["networks"][role]["parameters"] == int(float(best["parameters"]))
    found = yaml.safe_load((root / "store" / result["artefacts"]["search"] / FOUND).read_text())
    assert found[0]["options"] == result["student"]
    assert parameter_count(load_student(directory)) == int(float(best["parameters"]))
    # The words that were printed give the same student to any other method.
    words = (best["words"], "student=resnet8_half", "method=kd", "recipe=default")
    other, _ = run(root, *(word for word in SHORT if "search" not in word), *words)
    assert other["artefacts"]["alone"] == result["artefacts"]["alone"]


@pytest.mark.slow
@pytest.mark.parametrize("take", ["worst", "random"])
def test_other_candidates_share_the_search(root: Path, finished, take: str) -> None:
    result, _ = run(root, *SHORT, f"{PLACE}.take={take}")
    assert result["artefacts"]["search"] == finished[0]["artefacts"]["search"]
    assert result["artefacts"]["teacher"] == finished[0]["artefacts"]["teacher"]
    assert result["search"]["words"] in {row["words"] for row in history(root, result)}
    if take == "worst":
        ours, best = (sum(each["search"]["scores"].values()) for each in (result, finished[0]))
        assert ours < best


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{PLACE}.max_parameters=1000"], r"none of 27 architectures keeps the budget \(max_par"),
        ([f"{PLACE}.max_layers=2"], r"the smallest values are .* 10 layers"),
        (["student=mlp"], r"space\.blocks: the student has no such option"),
        ([f"{PLACE}.space={{blocks:[[1,1]]}}"], r"space\.blocks: needs different values"),
        ([f"{PLACE}.space={{blocks:[[1,2],[1]]}}"], "differ in length"),
        (["teacher=resnet8"], "no architecture could be scored; the last: .* 32 and 64 channels"),
    ],
    ids=["parameters", "layers", "option", "values", "network", "width"],
)
def test_a_search_that_cannot_be_is_one_line(tmp_path: Path, words, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, *SHORT, *words)
    assert "\n" not in str(caught.value)


def test_a_search_without_a_score_is_one_line_again(tmp_path: Path) -> None:
    """All its candidates are known from the first attempt."""
    for _ in range(2):
        with pytest.raises(UserError, match="no architecture could be scored"):
            run(tmp_path, *SHORT, "teacher=resnet8", f"{PLACE}.evaluations=5")


def test_more_parents_than_the_tournament_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="parents=9 cannot exceed tournament=4"):
        run(tmp_path, *SHORT, f"{PLACE}.strategy.parents=9")


def kill_in_search(root: Path, number: int) -> None:
    """Start the run in a process that is killed while it scores its ``number``-th candidate."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    evaluated, seen = Search._evaluated, [0]

    def dying(self, *arguments):
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluated(self, *arguments)

    try:
        Search._evaluated = dying
        run(root, *SHORT)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(1)


def assert_same(expected: tuple[dict, Path], found: tuple[dict, Path]) -> None:
    (first, one), (second, other) = expected, found
    assert metrics_of(second) == metrics_of(first)
    assert second["search"] == first["search"]
    assert history(other, second) == history(one, first)


@pytest.mark.slow
def test_killed_in_the_search_and_started_again(tmp_path: Path, root: Path, finished) -> None:
    kill_in_search(tmp_path, 8)
    (state,) = tmp_path.glob("store/architecture/*/search.json")
    assert '"choices"' in state.read_text(), "what was tried before is kept"
    result, directory = run(tmp_path, *SHORT)
    log = (directory / "log.txt").read_text()
    assert re.search(r"search: continuing after (5|10) architectures", log)
    assert_same((finished[0], root), (result, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [pytest.param(1, id="between two phases"), pytest.param(44, id="in mid-phase")]
)
def test_killed_in_training_and_started_again(tmp_path: Path, step: int) -> None:
    """The first step is the teacher's, after the search; the 44th is one of the student's."""
    expected, _ = run(tmp_path / "whole", *SHORT)
    run_and_kill(tmp_path / "killed", SHORT, step=step, often=True)
    found, directory = run(tmp_path / "killed", *SHORT)
    assert "search: found in the store" in (directory / "log.txt").read_text()
    assert_same((expected, tmp_path / "whole"), (found, tmp_path / "killed"))
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


# -- full scale ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param("diswot_depths", marks=pytest.mark.slow), "diswot_nas_bench_201"]
)
def test_a_step_at_full_scale_on_stand_ins(miniature, tmp_path: Path, recipe: str) -> None:
    """The paper's searches with few candidates, then one step of every stage."""
    miniature("uoft-cs/cifar100", columns=("img", "fine_label"))
    words = ["method=diswot", f"recipe={recipe}", "dataset=cifar100", "trainer=cpu", "dry=true"]
    words += [f"output_dir={tmp_path}", "trainer.progress=off", f"{PLACE}.scorer.batch_size=8"]
    if recipe == "diswot_depths":
        words += ["teacher=resnet14", "student=resnet8"]
    else:
        words += ["teacher=nas_bench_201", "teacher.cells=1", "teacher.width=4"]
        words += ["student=nas_bench_201", "student.cells=1", "student.width=4"]
    config = compose(words, open_catalogue())
    if recipe == "diswot_depths":
        # Two candidates have no rank correlation; the ranking is left to the real run.
        del config.values["recipe"]["stages"]["ranking"]
        config.values["recipe"]["stages"]["search"]["evaluations"] = 2
        config.values["recipe"]["stages"] |= compose(["method=diswot"], open_catalogue()).values[
            "recipe"
        ]["stages"] | {"search": config.values["recipe"]["stages"]["search"]}
    assert any(line.startswith("student") for line in check(config.values, config.names))
    result = run_experiment(config.values, names=config.names, overrides=[], command=[])
    assert result["search"]["evaluations"] == 2
    assert set(result["networks"]) == {"teacher", "alone", "distilled"}


@pytest.mark.slow
def test_the_published_ranking_needs_its_space(tmp_path: Path) -> None:
    words = ("recipe=diswot_depths", "student=resnet8_half", "teacher=resnet20_half")
    words += ("method=diswot", "dataset=digits", f"{PLACE}.space={{blocks:[[1,2],[1,2],[1,2]]}}")
    words += (f"{PLACE}.scorer.batch_size=8", "training=smoke")
    with pytest.raises(UserError, match=r"no accuracy was published for student\.blocks=\[1,1,2\]"):
        run(tmp_path, *words)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(os.environ.get("KDRUN_DATA", "/nowhere"), "uoft-cs", "cifar100").is_dir(),
    reason="KDRUN_DATA holds no uoft-cs/cifar100",
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_rank_the_published_networks(tmp_path: Path, seed: int) -> None:
    words = ("method=diswot", "recipe=diswot_depths", "dataset=cifar100", "teacher=resnet56")
    result, _ = run(tmp_path, *words, "student=resnet8", f"seed={seed}")
    found = result["ranking"]
    assert found["semantic"]["spearman"] > 0.6
    assert found["parameters"]["spearman"] == pytest.approx(0.968, abs=5e-3)
    assert found["layers"]["spearman"] == pytest.approx(0.814, abs=0.02)
