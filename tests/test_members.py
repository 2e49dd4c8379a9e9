"""Runs side by side: bit for bit those of one command each, also after an interruption."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdrun import shared_pass, side_by_side
from kdrun.catalogue import open_catalogue
from kdrun.errors import ConfigErrors, Interrupted, UserError
from kdrun.identity import identity
from kdrun.lockstep import Ended
from kdrun.logs import TrainingLog
from kdrun.members import MemberRun, group_of, member_runs
from kdrun.methods.kd import KD
from kdrun.run import run as run_words
from kdrun.run import run_beside
from kdrun.side_by_side import check_methods, run_side_by_side, student_bytes
from kdrun.stages.training import data_seed
from tests.tiny import WORDS, digits, identical, run, tiny_config

COMMON = (
    *("teacher=small_cnn", "teacher.widths=[8,16,16]", "data_seed=3", "training.epochs=2"),
    *("training.batch_size=256", "student.widths=[4,8,8]", "teacher.allow_chance=true"),
    "dataset.augmentation.crop_padding=1",
)
STEPS = 2 * 5
"""Two epochs of 1,102 images in batches of 256."""

OF_THE_TEACHER = (
    "'training.teacher.optimizer={_target_: torch.optim.SGD, lr: 0.05, momentum: 0.9, "
    "weight_decay: 0.0005, nesterov: true}'"
)
MEMBERS = (
    "seed=0",
    "seed=1 method.temperature=8",
    f"method=dkd seed=2 training.optimizer.lr=0.01 {OF_THE_TEACHER}",
    "method=fitnet seed=0",
    "method=rkd seed=1",
    "method=mlld seed=4",
    "student=mlp student.hidden=[16] student.dropout=0.3 seed=1",
)
"""Two temperatures, another learning rate, a projector, relations, a strong view, dropout."""
FEW = (MEMBERS[0], MEMBERS[3], MEMBERS[6])
TIMES = ("seconds", "samples_per_second", "memory_mib")


def command(root: Path, *more: str) -> list[str]:
    words = [*WORDS, f"output_dir={root}", *COMMON, *more]
    return list({word.partition("=")[0]: word for word in words}.values())


def chosen(root: Path, members: Sequence[str], *more: str) -> list[MemberRun]:
    return member_runs(command(root, *more), members, open_catalogue())


def finished(root: Path, members: Sequence[str] = FEW, *more: str) -> list[dict[str, Any]]:
    ended = run_side_by_side(chosen(root, members, *more), [])
    assert [end.error for end in ended] == [None] * len(members)
    return [end.result for end in ended]


def trained(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that a run has left in numbers, but for times."""
    directory, found = Path(result["directory"]), {}
    for name in ("student", "student_best", "predictions"):
        file = load_file(directory / f"{name}.safetensors")
        found |= {f"{name} {key}": value for key, value in file.items()}
    with (directory / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            numbers = [float(value) for name, value in row.items() if name not in TIMES]
            found[f"epoch {row['epoch']}"] = torch.tensor(numbers, dtype=torch.float64)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of all members, each of a command of its own."""
    root = tmp_path_factory.mktemp("alone")
    return {member.label: run(root, *member.words)[0] for member in chosen(root, MEMBERS)}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of the batch with every forward of a shared network."""
    counted: list[int] = []
    original = shared_pass.run_network

    def counting(task, network, batch, *others):
        counted.append(len(batch))
        return original(task, network, batch, *others)

    monkeypatch.setattr(shared_pass, "run_network", counting)
    return counted


# -- the same as alone -----------------------------------------------------------------------------


@pytest.mark.slow
def test_members_are_the_runs_that_they_would_be_alone(tmp_path: Path, alone, forwards) -> None:
    results = finished(tmp_path, MEMBERS)
    assert len(forwards) == STEPS and sum(forwards) == 2 * digits().train_size
    for label, result in zip(MEMBERS, results, strict=True):
        expected = alone[label]
        assert identical(trained(result), trained(expected)), label
        theirs, ours = Path(expected["directory"]), Path(result["directory"])
        assert ours.relative_to(tmp_path) == theirs.relative_to(theirs.parents[3])
        for role, network in result["networks"].items():
            tests = [entry for entry in network if entry.startswith("test")]
            assert tests and all(network[e] == expected["networks"][role][e] for e in tests)
    # Finished members are found where their own commands look for them, and not run again.
    assert finished(tmp_path, MEMBERS) == results
    assert len(forwards) == STEPS
    assert run(tmp_path, *chosen(tmp_path, MEMBERS)[1].words)[0] == results[1]


def test_steps_in_parts_share_the_teacher_too(tmp_path: Path, forwards) -> None:
    (parts,) = (finished(tmp_path / "a", FEW[:2], "trainer.accumulate=2"),)
    assert len(forwards) == 2 * STEPS
    for member, result in zip(
        chosen(tmp_path / "b", FEW[:2], "trainer.accumulate=2"), parts, strict=True
    ):
        single, _ = run(tmp_path / "b", *member.words)
        assert identical(trained(result), trained(single))


# -- interruptions ---------------------------------------------------------------------------------


@pytest.fixture
def stop_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Sends this process SIGTERM in the step of a stage that the test names, once."""
    wanted: dict[str, int] = {}
    original = TrainingLog.step

    def step(self: TrainingLog, module) -> None:
        if wanted.get(self.name) == module.step_count:
            del wanted[self.name]
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, module)

    monkeypatch.setattr(TrainingLog, "step", step)
    handler = signal.getsignal(signal.SIGTERM)
    yield wanted
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("lost", [(), (1,)], ids=["all saved", "one lost its checkpoint"])
def test_an_interrupted_group_goes_on_as_if_nothing_had_been(
    tmp_path: Path, alone, stop_in, lost
) -> None:
    for stage, step in (("alone", 3), ("distil", 7)):
        stop_in[stage] = step
        ended = run_side_by_side(chosen(tmp_path, FEW), [])
        assert all(isinstance(end.error, Interrupted) for end in ended), ended
        assert {end.error.exit_code for end in ended} == {143}
    directories = [Path(alone[label]["directory"]) for label in FEW]
    for number, place in enumerate(directories):
        directory = tmp_path / place.relative_to(place.parents[3])
        assert (directory / "last.ckpt").is_file()
        if number in lost:
            for checkpoint in directory.glob("*.ckpt"):
                checkpoint.unlink()
    for label, result in zip(FEW, finished(tmp_path), strict=True):
        assert identical(trained(result), trained(alone[label]))


def test_the_whole_command_says_how_to_go_on(tmp_path: Path, stop_in) -> None:
    words = [*command(tmp_path), 'members=["seed=0","seed=1"]']
    stop_in["distil"] = 2
    with pytest.raises(Interrupted) as caught:
        run_words(words, [], open_catalogue())
    assert caught.value.exit_code == 143
    assert "members=" in caught.value.resume_command
    assert run_words(words, [], open_catalogue()).exit_code == 0


def test_a_trial_of_every_stage_leaves_nothing(tmp_path: Path, capsys) -> None:
    words = [
        *command(tmp_path, "trainer.progress=plain", "dry=true"),
        'members=["seed=0","seed=1"]',
    ]
    assert run_words(words, [], open_catalogue()).exit_code == 0
    out = capsys.readouterr().out
    for member in ("seed=0", "seed=1"):
        assert f"{member}  dry run: every stage ran (again start)" in out
    assert not list(tmp_path.iterdir())


# -- failures --------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, what) -> None:
    """Let KD at temperature 8 do ``what`` with the teacher's output before its loss."""
    original = KD.losses

    def losses(self, student, teachers, batch, progress):
        if self.temperature == 8:
            what(teachers["teacher"], batch)
        return original(self, student, teachers, batch, progress)

    monkeypatch.setattr(KD, "losses", losses)


def test_a_member_that_fails_leaves_the_others_alone(
    tmp_path: Path, alone, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(output, batch) -> None:
        raise RuntimeError("no such luck")

    spoil(monkeypatch, fail)
    words = [*command(tmp_path), f'members=["{MEMBERS[0]}","{MEMBERS[1]}"]']
    with pytest.raises(UserError) as caught:
        run_words(words, [], open_catalogue())
    assert caught.value.exit_code == 1
    head, line, again = str(caught.value).splitlines()
    assert head == "1 of 2 runs failed" and line == f"{MEMBERS[1]}: no such luck"
    assert "method.temperature=8" in again
    assert "RuntimeError: no such luck" in capsys.readouterr().err
    single = chosen(tmp_path, MEMBERS[:1])[0]
    assert identical(trained(run(tmp_path, *single.words)[0]), trained(alone[MEMBERS[0]]))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (lambda output, batch: output.logits.mul_(1), "outputs of teacher"),
        (lambda output, batch: batch.target.add_(0), "batch"),
    ],
)
def test_what_is_shared_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what, named: str
) -> None:
    spoil(monkeypatch, what)
    first, second = run_side_by_side(chosen(tmp_path, MEMBERS[:2]), [])
    assert first.error is None
    assert isinstance(second.error, UserError)
    assert re.search(f"the method changes the {named}.* in place", str(second.error))


@pytest.mark.parametrize(
    ("epochs", "said"),
    [(2, "the method changes the batch"), (1, "the method of a run beside it changes the batch")],
)
def test_what_is_shared_is_looked_at_after_the_last_batch_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, said: str
) -> None:
    """Where an epoch has one batch, that is the last one."""
    spoil(monkeypatch, lambda output, batch: batch.target.add_(0))
    words = ("training.batch_size=2000", f"training.epochs={epochs}", "recipe.stages.alone=null")
    ended = run_side_by_side(chosen(tmp_path, (MEMBERS[1], MEMBERS[0]), *words), [])
    assert isinstance(ended[2 - epochs].error, UserError)
    assert str(ended[2 - epochs].error).startswith(said)


def test_objects_around_shared_tensors_are_ones_own(
    tmp_path: Path, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(output, batch) -> None:
        output.features.clear()
        batch.views.clear()
        batch.target = output.logits = None
        raise UserError("done")

    spoil(monkeypatch, change)
    ended = run_side_by_side(chosen(tmp_path, (MEMBERS[1], MEMBERS[3])), [])
    assert str(ended[0].error) == "done"
    assert identical(trained(ended[1].result), trained(alone[MEMBERS[3]]))


# -- what cannot go side by side -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "more", "line"),
    [
        (("seed=0", "seed=1"), ("data_seed=null",), "seed=1: its data come in another order .*"),
        (("seed=0", "data_seed=4"), (), "data_seed=4: its data come in another order .*"),
        (("seed=0", "method=kd"), (), "method=kd: is the same run as seed=0"),
        (("seed=0", "seed=1 trainer.precision=64"), (), ".*trainer.precision is 64, .* is 32; .*"),
        (
            ("seed=0", "seed=1 training.batch_size=64"),
            (),
            ".*training.batch_size is 64, .* 256; .*",
        ),
        (("seed=0", "seed=1 teacher.seed=2"), (), ".*teacher.seed is 2, that of seed=0 is 0; .*"),
        (
            ("seed=0", "seed=1 training.optimizer.lr=1"),
            (),
            ".*training.teacher.optimizer.lr is 1.0, .*",
        ),
        (
            ("seed=0", "seed=1"),
            ("trainer.compile=true",),
            "seed=0: trainer.compile: not possible.*",
        ),
        (("seed=0", "seed=1"), ("trainer.devices=2",), "seed=0: trainer.devices: .* set it to 1"),
        (("seed=0", "seed=1"), ("teacher.cache=logits",), "seed=0: teacher.cache=logits: .* none"),
        (("seed=0", "sede=1"), (), "sede=1: sede: no such option.*"),
        (("seed=0", "seed=1 'x"), (), "seed=1 'x: cannot be read: No closing quotation"),
        (
            ("seed=0", """'members=["seed=2"]'"""),
            (),
            ".*: members: cannot have members of their own",
        ),
    ],
)
def test_what_cannot_go_side_by_side_is_said_at_once(
    tmp_path: Path, members: Sequence[str], more: Sequence[str], line: str
) -> None:
    with pytest.raises(ConfigErrors) as caught:
        chosen(tmp_path, members, *more)
    assert re.fullmatch(f"members, {line}", caught.value.problems[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "reason"),
    [("dml", "has no frozen teacher to share")],
)
def test_methods_without_a_teacher_to_share_are_refused(
    tmp_path: Path, method: str, reason: str
) -> None:
    runs = chosen(tmp_path, ("seed=0", f"method={method}"))
    with pytest.raises(ConfigErrors) as caught:
        check_methods(runs)
    assert str(caught.value) == (
        f"members, method={method}: method={method} {reason}; run it by itself"
    )
    # Where nobody asked for it, such a run goes by itself.
    assert [ended.exit_code for ended in run_beside(runs, [])] == [0, 0]


def test_which_runs_are_grouped_without_being_asked(tmp_path: Path) -> None:
    def group(*words: str) -> str:
        return group_of(tiny_config(tmp_path, *COMMON, *words).values)

    alike = ("seed=1", "method=dkd", "student.widths=[8,8,8]")
    assert group() and {group(), *map(group, alike)} == {group()}
    assert not group("data_seed=null") and not group("teacher.cache=logits")
    different = ("data_seed=4", "teacher.seed=1", "training.batch_size=32", "protocol=paper")
    assert len({group(), *map(group, different)}) == 5


# -- how many at once ------------------------------------------------------------------------------


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the groups that are run, which do nothing."""
    found: list[int] = []

    def run_group(runs, flags):
        found.append(len(runs))
        return [Ended()] * len(runs)

    monkeypatch.setattr(side_by_side, "_run_group", run_group)
    return found


def test_no_more_at_once_than_asked_for(tmp_path: Path, sizes: list[int]) -> None:
    run_side_by_side(chosen(tmp_path, MEMBERS, "members_at_once=3"), [])
    assert sizes == [3, 3, 1]


def test_no_more_at_once_than_fit_into_memory(
    tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = chosen(tmp_path, MEMBERS)
    largest = max(student_bytes(run.config.values, digits()) for run in runs)
    monkeypatch.setattr(side_by_side, "free_memory", lambda device: 4.5 * largest)
    run_side_by_side(runs, [])
    assert sizes == [2, 2, 2, 1]


def test_memory_of_a_student_is_its_weights_what_the_optimiser_keeps_and_the_average(
    tmp_path: Path,
) -> None:
    def size(*words: str) -> int:
        values = tiny_config(tmp_path, "student=mlp", "student.hidden=[16]", *words).values
        return student_bytes(values, digits())

    weights = 4 * (64 * 16 + 16 + 16 * 10 + 10)
    assert size() == 2 * weights
    assert size("training.ema=0.9") == 3 * weights
    assert size("training.optimizer.momentum=0", "training.optimizer.nesterov=false") == weights
    assert size("trainer.precision=64") == 4 * weights


# -- the order of the data -------------------------------------------------------------------------


def test_the_order_of_the_data_has_its_own_seed(tmp_path: Path) -> None:
    given = tiny_config(tmp_path, "data_seed=3", "seed=1").values
    assert data_seed(given, "student", 1) == 3
    assert data_seed(given, "teacher", 0) == 0
    assert data_seed(given, "image_teacher", 2) == 2
    unset = tiny_config(tmp_path, "seed=1").values
    assert data_seed(unset, "student", 1) == 1
    # What was made before there was such a seed keeps its name.
    assert "data_seed" not in identity(unset) and identity(given)["data_seed"] == 3
    assert not {"members", "members_at_once"} & identity(given).keys()


@pytest.mark.slow
def test_other_data_seeds_are_other_runs(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "data_seed=0")
    same, _ = run(tmp_path)
    other, _ = run(tmp_path, "data_seed=1")
    assert identical(trained(first), trained(same)) and first["directory"] != same["directory"]
    assert not identical(trained(first), trained(other))
    assert first["artefacts"]["teacher"] == other["artefacts"]["teacher"]
    assert first["artefacts"]["alone"] != other["artefacts"]["alone"]


# -- the installed command -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_killed_and_started_again(tmp_path: Path) -> None:
    """SIGKILL in the middle of a group, then SIGTERM, then to the end; each member as if alone."""
    program = Path(sys.executable).with_name("kdrun")
    words = [
        *("teacher=small_cnn", "student=mlp", "student.dropout=0.2", "trainer=cpu", "data_seed=0"),
        *("training.epochs=20", "teacher.allow_chance=true", "training.teacher.epochs=1"),
    ]
    members = 'members=["seed=0","method=dkd seed=1"]'
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [program, *words, *more],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def until(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdout is not None
        assert any(line in said for said in process.stdout), line

    killed = start(members)
    until(killed, "seed=0  distil  epoch 3/")
    killed.kill()
    killed.communicate()
    stopped = start(members)
    until(stopped, "method=dkd seed=1  distil  epoch 7/")
    stopped.terminate()
    said, _ = stopped.communicate()
    assert stopped.returncode == 143, said
    assert f"continue with: kdrun {' '.join(words)}" in said
    done = start(members)
    said, _ = done.communicate()
    assert done.returncode == 0, said
    assert "seed=0  distil: continuing at epoch" in said
    alone = tmp_path / "alone"
    for more in (["seed=0"], ["method=dkd", "seed=1"]):
        single = start(*more, f"output_dir={alone}")
        said, _ = single.communicate()
        assert single.returncode == 0, said
    for method in ("kd", "dkd"):
        results = [
            json.loads(next(root.glob(f"digits/*/{method}-*/seed*/result.json")).read_text())
            for root in (tmp_path / "outputs", alone)
        ]
        assert [result["side_by_side"] for result in results] == [2, 1]
        ours, theirs = results
        directory = tmp_path / ours["directory"]
        assert identical(trained(ours | {"directory": directory}), trained(theirs))
