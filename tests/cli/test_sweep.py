"""``kdrun -m`` through Hydra, with the runs themselves replaced."""

import json

import pytest

from kdrun import sweep as module
from kdrun.catalogue import open_catalogue
from kdrun.errors import ConfigErrors, Interrupted, UserError
from kdrun.job import job_words, mangled, read_records
from kdrun.run import Outcome


@pytest.fixture
def catalogue():
    return open_catalogue()


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Record the words of each run; a run does what ``behave[number]`` says, or succeeds."""
    monkeypatch.chdir(tmp_path)

    class Runs:
        words: list[list[str]] = []
        behave: dict[int, object] = {}

    runs = Runs()
    runs.words, runs.behave = [], {}

    def run(words, flags, catalogue):
        number = len(runs.words)
        runs.words.append(list(words))
        what = runs.behave.get(number, 90.0 + number)
        if isinstance(what, BaseException):
            raise what
        return what if isinstance(what, Outcome) else Outcome(0, what)

    monkeypatch.setattr("kdrun.run.run", run)
    return runs


def test_a_grid_runs_every_combination(runs, catalogue, capsys, tmp_path):
    words = ["method=kd,dkd", "seed=0,1", "training=smoke", "method.supervised_weight=0.5"]
    assert module.sweep(words, [], catalogue) == 0
    assert runs.words == [
        [f"method={m}", f"seed={s}", "training=smoke", "method.supervised_weight=0.5"]
        for m in ("kd", "dkd")
        for s in (0, 1)
    ]
    shown = capsys.readouterr().out
    assert "#3  method=dkd seed=1  done  93.0000" in shown
    assert "4 runs, 0 failed" in shown
    assert len(list(tmp_path.glob("outputs/sweeps/*/jobs/*.json"))) == 4


def test_words_survive_the_way_through_hydra(runs, catalogue):
    words = [
        "seed=0,1",
        "student=timm/a.b_c-d",
        "training.scheduler.milestones=[1,2]",
        "training.clip_norm=null",
        "output_dir='with space'",
        "student.options={depth: 2}",
        "method.t_squared=false",
    ]
    module.sweep(words, [], catalogue)
    from kdrun.config import compose

    for seed, arrived in enumerate(runs.words):
        sent = [f"seed={seed}", *words[1:]]
        assert compose(arrived, catalogue) == compose(sent, catalogue)


def test_globs_and_ranges(runs, catalogue):
    module.sweep(["method=glob(*kd,exclude=p*)", "seed=range(2)"], [], catalogue)
    methods = {words[0] for words in runs.words}
    assert {"method=kd", "method=dkd"} <= methods
    assert {words[1] for words in runs.words} == {"seed=0", "seed=1"}


def test_every_value_is_checked_before_the_first_run(runs, catalogue):
    with pytest.raises(ConfigErrors) as refused:
        module.sweep(
            ["method=kd,dkdd", "seed=0,-1", "training.epochs=1,x", "launcher=joblb"], [], catalogue
        )
    text = "\n".join(refused.value.problems)
    assert "Did you mean method=dkd?" in text
    assert "seed: must be integer >= 0, got -1" in text
    assert "training.epochs: must be integer >= 1, got x" in text
    assert "Did you mean launcher=joblib?" in text
    assert runs.words == []


def test_an_option_must_exist_for_every_method_of_the_grid(runs, catalogue):
    with pytest.raises(ConfigErrors, match="method.beta: no such option of kd"):
        module.sweep(["method=kd,dkd", "method.beta=1,2"], [], catalogue)


def test_large_grids_are_checked_value_by_value(runs, catalogue):
    words = ["seed=range(40)", "teacher.seed=range(40)", "training.epochs=1,2,-3"]
    with pytest.raises(ConfigErrors) as refused:
        module.sweep(words, [], catalogue)
    assert refused.value.problems == ["training.epochs: must be integer >= 1, got -3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher=joblib", "launcher.njobs=2"], "Did you mean launcher.n_jobs?"),
        (["launcher.n_jobs=2"], "say which launcher first"),
        (["method.temperature=interval(1,2)"], "needs a search"),
        (["sweeper=grid"], "no such sweeper"),
    ],
)
def test_settings_of_launcher_and_sweeper_are_checked(runs, catalogue, words, said):
    with pytest.raises(ConfigErrors) as refused:
        module.sweep(words, [], catalogue)
    assert said in str(refused.value)
    with pytest.raises(UserError, match="must be true or false"):
        module.sweep(["fail_fast=maybe"], [], catalogue)


def test_a_package_that_is_missing_is_named_with_its_extra(runs, catalogue, monkeypatch):
    real = module.find_source
    monkeypatch.setattr(
        module, "find_source", lambda name: None if "joblib" in name else real(name)
    )
    with pytest.raises(ConfigErrors, match=r"pip install 'kdrun\[joblib\]'"):
        module.sweep(["launcher=joblib", "seed=0,1"], [], catalogue)


def test_a_failed_run_does_not_stop_the_others(runs, catalogue, capsys, tmp_path):
    runs.behave = {0: RuntimeError("first\nsecond"), 2: Outcome(0, float("nan")), 3: Outcome(1)}
    assert module.sweep(["seed=0,1,2,3"], ["--config-dir", str(tmp_path)], catalogue) == 1
    shown = capsys.readouterr().out
    assert "4 runs, 3 failed" in shown
    assert "#0 RuntimeError: second" in shown
    assert f"kdrun --config-dir {tmp_path} seed=0" in shown
    assert "#2 the validation result is not a number" in shown
    assert "#3 exit status 1" in shown
    record = json.loads(next(tmp_path.glob("outputs/sweeps/*/jobs/0.json")).read_text())
    assert "Traceback" in record["trace"]


def test_fail_fast_stops_at_the_first_failure(runs, catalogue, capsys):
    runs.behave = {1: UserError("no")}
    assert module.sweep(["seed=0,1,2", "fail_fast=true"], [], catalogue) == 1
    assert len(runs.words) == 2
    assert "interrupted" not in capsys.readouterr().out.splitlines()[-1]


def test_an_interruption_ends_the_sweep_and_says_how_to_go_on(runs, catalogue, capsys):
    runs.behave = {1: Interrupted("kdrun seed=1")}
    assert module.sweep(["seed=0,1,2"], [], catalogue) == 130
    assert len(runs.words) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("interrupted; continue with: kdrun -m seed=0,1,2 hydra.sweep.dir=")


def test_keys_are_flat_for_hydra_and_dotted_again_in_jobs():
    assert mangled("training.optimizer.lr") == "training/optimizer/lr"
    assert job_words(["training/optimizer/lr=0.1", "student=timm/a/b"]) == [
        "training.optimizer.lr=0.1",
        "student=timm/a/b",
    ]


# -- search ----------------------------------------------------------------------------------------

SEARCH = ["sweeper=optuna", "method.temperature=interval(1,8)", "seed=0"]


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


def test_a_search_maximises_and_survives_failures(runs, catalogue, tmp_path, optuna):
    runs.behave = {1: RuntimeError("diverged"), 2: Outcome(0, float("nan")), 3: 99.0}
    assert module.sweep([*SEARCH, "sweeper.n_trials=5"], [], catalogue) == 1
    assert len(runs.words) == 5
    (folder,) = tmp_path.glob("outputs/sweeps/*")
    study = optuna.load_study(study_name="kdrun", storage=f"sqlite:///{folder}/study.db")
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.best_value == 99.0
    (records,) = {len(read_records(folder / "jobs"))}
    assert records == 5


def test_a_search_goes_on_to_its_total(runs, catalogue, tmp_path, optuna):
    storage = f"sweeper.storage=sqlite:///{tmp_path}/search.db"
    module.sweep([*SEARCH, storage, "sweeper.n_trials=2"], [], catalogue)
    module.sweep([*SEARCH, storage, "sweeper.n_trials=3"], [], catalogue)
    assert len(runs.words) == 3
    assert len({tuple(words) for words in runs.words}) == 3, "the third trial repeats another"
    with pytest.raises(UserError, match="has 3 trials, best value"):
        module.sweep([*SEARCH, storage, "sweeper.n_trials=3"], [], catalogue)


def test_the_ends_of_a_search_range_are_checked(runs, catalogue, optuna):
    with pytest.raises(ConfigErrors, match=r"method.temperature: must be number > 0, got 0"):
        module.sweep(["sweeper=optuna", "method.temperature=interval(0,8)"], [], catalogue)
