"""``kdrun -m`` with a common order of data: groups, with the runs themselves replaced."""

import pytest

from kdrun import sweep as module
from kdrun.catalogue import open_catalogue
from kdrun.errors import Interrupted, UserError
from kdrun.run import Outcome


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """The labels of the runs of each group, in the order in which groups are run."""
    monkeypatch.chdir(tmp_path)
    found = []
    spoilt = {}

    def run(words, flags, catalogue):
        found.append([" ".join(words)])
        return Outcome(0, 90.0, "somewhere")

    def run_beside(runs, flags):
        found.append([run.label for run in runs])
        return [spoilt.get(run.label, Outcome(0, 90.0, "somewhere")) for run in runs]

    monkeypatch.setattr("kdrun.run.run", run)
    monkeypatch.setattr("kdrun.run.run_beside", run_beside)
    return found, spoilt


@pytest.mark.slow
def test_runs_with_a_common_order_go_together(groups):
    found, _ = groups
    words = ["method=kd,dkd", "teacher=mlp,resnet8", "seed=0,1", "data_seed=0"]
    assert module.sweep(words, [], open_catalogue()) == 0
    assert found == [
        [f"method={m} teacher={teacher} seed={s}" for m in ("kd", "dkd") for s in (0, 1)]
        for teacher in ("mlp", "resnet8")
    ]


def test_no_more_than_allowed_go_together(groups):
    found, _ = groups
    module.sweep(["seed=range(5)", "data_seed=0", "members_at_once=2"], [], open_catalogue())
    assert [len(group) for group in found] == [2, 2, 1]


@pytest.mark.parametrize(
    "words", [["seed=0,1"], ["seed=0,1", "data_seed=0", "members_at_once=1"], ["data_seed=0,1"]]
)
def test_all_others_go_by_themselves(groups, words):
    found, _ = groups
    assert module.sweep(words, [], open_catalogue()) == 0
    assert [len(group) for group in found] == [1, 1]


def test_a_failure_is_that_of_its_own_run(groups, capsys):
    found, spoilt = groups
    spoilt["seed=1"] = UserError("no such luck")
    assert module.sweep(["seed=0,1,2", "data_seed=0"], [], open_catalogue()) == 1
    assert len(found) == 1
    assert "3 runs, 1 failed" in capsys.readouterr().out


def test_an_interruption_ends_the_sweep(groups):
    _, spoilt = groups
    spoilt |= {"seed=0": Interrupted("kdrun"), "seed=1": Interrupted("kdrun")}
    assert module.sweep(["seed=0,1", "data_seed=0"], [], open_catalogue()) == 130


def test_members_of_a_sweep_are_refused(groups):
    with pytest.raises(UserError, match="side by side by themselves"):
        module.sweep(["seed=0,1", 'members=["seed=3"]'], [], open_catalogue())
    assert groups[0] == []
