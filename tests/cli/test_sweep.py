"""``kdrun -m`` through Hydra, with the runs themselves replaced."""

import json

import pytest

from kdrun import sweep as module
from kdrun import sweep_plan
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
        (["launcher"], "launcher: '=' is missing"),
        (["launcher=joblib", "launcher.n_jobs"], "launcher.n_jobs: '=' is missing"),
        (["hydra.sweep.dir", "seed=0,1"], "hydra.sweep.dir: '=' is missing"),
        (["+launcher=joblob"], "Did you mean launcher=joblib?"),
    ],
)
def test_settings_of_launcher_and_sweeper_are_checked(runs, catalogue, words, said):
    with pytest.raises(ConfigErrors) as refused:
        module.sweep(words, [], catalogue)
    assert said in str(refused.value)
    with pytest.raises(UserError, match="must be true or false"):
        module.sweep(["fail_fast=maybe"], [], catalogue)


def test_a_package_that_is_missing_is_named_with_its_extra(runs, catalogue, monkeypatch):
    real = sweep_plan.find_source
    monkeypatch.setattr(
        sweep_plan, "find_source", lambda name: None if "joblib" in name else real(name)
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


@pytest.mark.parametrize("seed", ["sweeper.sampler.seed=0", "sweeper.sampler.seed=null"])
def test_a_search_goes_on_to_its_total(runs, catalogue, tmp_path, optuna, seed):
    storage = f"sweeper.storage=sqlite:///{tmp_path}/search.db"
    module.sweep([*SEARCH, storage, "sweeper.n_trials=2", seed], [], catalogue)
    module.sweep([*SEARCH, storage, "sweeper.n_trials=3", seed], [], catalogue)
    assert len(runs.words) == 3
    assert len({tuple(words) for words in runs.words}) == 3, "the third trial repeats another"
    with pytest.raises(UserError, match="has 3 trials, best value"):
        module.sweep([*SEARCH, storage, "sweeper.n_trials=3"], [], catalogue)


def test_the_ends_of_a_search_range_are_checked(runs, catalogue, optuna):
    with pytest.raises(ConfigErrors, match=r"method.temperature: must be number > 0, got 0"):
        module.sweep(["sweeper=optuna", "method.temperature=interval(0,8)"], [], catalogue)


def study_of(optuna, folder, name="kdrun"):
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/study.db")


def test_a_hopeless_trial_is_given_up_and_counts_with_its_best(
    runs, catalogue, tmp_path, capsys, optuna, monkeypatch
):
    """Trial 2 falls behind the median of the others at its second epoch, the first one judged."""
    from kdrun import pruning

    curves = [[50, 80, 90], [50, 82, 91], [60, 55, 99], [40, 95, 96]]

    def run(words, flags, catalogue):
        curve = curves[len(runs.words)]
        runs.words.append(list(words))
        for epoch, value in enumerate(curve[:-1], start=1):
            pruning.tell("teacher", epoch, 0.0)  # nobody's business
            pruning.tell("distil", epoch, float(value))
        return Outcome(0, float(curve[-1]))

    monkeypatch.setattr("kdrun.run.run", run)
    pruner = ["pruner=median", "pruner.n_startup_trials=1", "pruner.n_warmup_steps=2"]
    place = f"hydra.sweep.dir={tmp_path}/s"
    assert module.sweep([*SEARCH, *pruner, place, "sweeper.n_trials=4"], [], catalogue) == 0
    records = read_records(tmp_path / "s" / "jobs")
    assert [record.status for record in records] == ["done", "done", "pruned", "done"]
    assert (records[2].objective, records[2].error) == (60.0, "given up after epoch 2")
    assert "#2  " in (shown := capsys.readouterr().out) and "pruned  60.0000" in shown
    study = study_of(optuna, tmp_path / "s")
    assert [trial.value for trial in study.trials] == [90.0, 91.0, 60.0, 96.0]
    assert study.trials[2].intermediate_values == {1: 60.0, 2: 55.0}
    assert study.trials[2].user_attrs["given_up_after_epoch"] == 2


def test_an_interrupted_search_asks_the_same_trial_again(runs, catalogue, tmp_path, capsys, optuna):
    runs.behave = {2: Interrupted("kdrun")}
    words = [*SEARCH, f"hydra.sweep.dir={tmp_path}/s", "sweeper.n_trials=4"]
    assert module.sweep(words, [], catalogue) == 130
    assert "continue with: kdrun -m " in capsys.readouterr().out
    assert module.sweep(words, [], catalogue) == 0
    assert len(runs.words) == 5
    assert runs.words[3] == runs.words[2], "the interrupted run is not the first to go on"
    study = study_of(optuna, tmp_path / "s")
    values = [trial.value for trial in study.trials if trial.value is not None]
    assert values == [90.0, 91.0, 93.0, 94.0]
    statuses = {r.number: r.status for r in read_records(tmp_path / "s" / "jobs")}
    assert statuses == {0: "done", 1: "done", 2: "interrupted", 3: "done", 4: "done"}


def test_two_objectives(runs, catalogue, tmp_path, optuna):
    for number, parameters in enumerate((100, 10)):
        student = {"parameters": parameters, "training": {"seconds": 1.5}}
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps({"networks": {"distilled": student}}))
        runs.behave[number] = Outcome(0, 90.0 - number, str(folder))
    words = [*SEARCH, f"hydra.sweep.dir={tmp_path}/s", "sweeper.n_trials=2"]
    assert module.sweep([*words, "objectives=[validation,parameters]"], [], catalogue) == 0
    study = study_of(optuna, tmp_path / "s")
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.values for trial in study.trials] == [[90.0, 100.0], [89.0, 10.0]]
    with pytest.raises(UserError, match="2 of them best in one way or another"):
        module.sweep([*words, "objectives=[validation,parameters]"], [], catalogue)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["method.temperature=2,4,8"],
            r"method.temperature: the study in sqlite:.* draws it from 2,4, this search from 2,4,8",
        ),
        (["method.temperature=interval(2,4)"], r"from 2,4, this search from 2 to 4 \(Uniform\)"),
        (
            ["method.temperature=2,4", "sweeper.direction=minimize"],
            "was begun to maximize, this search is to minimize",
        ),
    ],
)
def test_a_study_keeps_what_it_looks_for(runs, catalogue, tmp_path, optuna, words, said):
    place = ["sweeper=optuna", f"hydra.sweep.dir={tmp_path}/s", "sweeper.n_trials=2", "seed=0"]
    module.sweep([*place, "method.temperature=2,4"], [], catalogue)
    place[2] = "sweeper.n_trials=3"
    with pytest.raises(UserError, match=said) as error:
        module.sweep([*place, *words], [], catalogue)
    assert "hydra.sweep.dir=" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(runs.words) == 2
    module.sweep([*place, "method.temperature=2,4"], [], catalogue)
    assert len(runs.words) == 3, "the study is as it was"


def test_a_search_of_which_every_trial_fails_is_told(runs, catalogue, tmp_path, capsys, optuna):
    runs.behave = {0: RuntimeError("diverged"), 1: RuntimeError("diverged")}
    words = [*SEARCH, f"hydra.sweep.dir={tmp_path}/s", "sweeper.n_trials=2"]
    assert module.sweep(words, [], catalogue) == 1
    assert "2 runs, 2 failed" in capsys.readouterr().out


def test_the_task_says_what_is_better(runs, catalogue, tmp_path, optuna):
    words = ["sweeper=optuna", "sweeper.n_trials=2", "method=taid", "method.alpha=1e-3,1e-2"]
    assert module.sweep([*words, f"hydra.sweep.dir={tmp_path}/s"], [], catalogue) == 0
    study = study_of(optuna, tmp_path / "s")
    assert study.direction.name == "MINIMIZE"
    assert study.best_value == 90.0


def test_a_storage_that_cannot_be_read_is_one_line(runs, catalogue, tmp_path, optuna):
    (tmp_path / "study.db").write_text("no data base " * 100)
    words = [*SEARCH, f"sweeper.storage=sqlite:///{tmp_path}/study.db"]
    with pytest.raises(UserError, match=r"^sweeper.storage=sqlite.*file is not a database$"):
        module.sweep(words, [], catalogue)


def test_sweeps_begun_in_the_same_second_have_places_of_their_own(
    runs, catalogue, tmp_path, monkeypatch
):
    monkeypatch.setattr(module.time, "strftime", lambda _: "now")
    for seeds in ("0,1", "2,3"):
        assert module.sweep([f"seed={seeds}"], [], catalogue) == 0
    places = {path.name for path in (tmp_path / "outputs" / "sweeps").iterdir()}
    assert places == {"now", "now-2"}


def test_two_processes_do_not_share_a_sweeps_records(runs, catalogue, tmp_path):
    from filelock import FileLock

    (tmp_path / "s").mkdir()
    with (
        FileLock(tmp_path / "s" / ".lock"),
        pytest.raises(UserError, match="another process works on this sweep"),
    ):
        module.sweep(["seed=0,1", f"hydra.sweep.dir={tmp_path}/s"], [], catalogue)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pruner=median"], "pruner=median: belongs to a search"),
        (["objectives=[validation]"], "belongs to a search"),
        ([*SEARCH, "pruner=medain"], "Did you mean pruner=median?"),
        ([*SEARCH, "pruner=median", "pruner.n_warmup=1"], "Did you mean pruner.n_warmup_steps?"),
        ([*SEARCH, "pruner=median", "pruner.n_warmup_steps=-1"], "must be integer >= 0, got -1"),
        ([*SEARCH, "pruner.n_warmup_steps=1"], "say which pruner first"),
        ([*SEARCH, "objectives=[validation,size]"], "objectives=size: no such objectives"),
        ([*SEARCH, "objectives=[seconds,seconds]"], "must be different ones of"),
        (
            [*SEARCH, "objectives=[validation,seconds]", "sweeper.direction=maximize"],
            "1 directions for 2 objectives",
        ),
        ([*SEARCH, "objectives=[validation,seconds]", "pruner=median"], "takes no objectives"),
        ([*SEARCH, "sweeper.n_trials=many"], "must be integer, got many"),
        ([*SEARCH, "sweeper.n_trials=0"], "must be integer >= 1, got 0"),
        ([*SEARCH, "sweeper.n_jobs=0"], "must be integer >= 1, got 0"),
        ([*SEARCH, "sweeper.direction=up"], "sweeper.direction=up: no such sweeper.direction"),
        ([*SEARCH, "sweeper.max_failure_rate=2"], "must be from 0 to 1, got 2"),
        (["sweep=digits_gird"], "Did you mean sweep=digits_grid?"),
    ],
)
def test_settings_of_searches_are_checked(runs, catalogue, words, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[").replace("?", r"\?")):
        module.sweep(
            [*words, "seed=0,1"] if "sweeper=optuna" not in words else words, [], catalogue
        )
    assert runs.words == []


# -- sweeps from files -----------------------------------------------------------------------------


def test_a_sweep_from_a_file_has_a_place_of_its_own(runs, catalogue, tmp_path):
    assert module.sweep(["sweep=digits_grid"], [], catalogue) == 0
    assert len(runs.words) == 12
    assert len(list(tmp_path.glob("outputs/sweeps/digits_grid/jobs/*.json"))) == 12
    module.sweep(["sweep=digits_grid", "seed=5", "method.temperature=2"], [], catalogue)
    assert len(runs.words) == 15
    assert all("seed=5" in words for words in runs.words[12:])
    assert len(list(tmp_path.glob("outputs/sweeps/digits_grid-*/jobs/*.json"))) == 3


@pytest.mark.parametrize("name", open_catalogue().choices("sweep"))
def test_shipped_sweeps_are_valid(catalogue, name):
    from kdrun.sweep_plan import check

    problems = check([f"sweep={name}"], catalogue)
    assert [problem for problem in problems if "is not installed" not in problem] == []


def test_a_broken_file_of_a_sweep_is_told(runs, tmp_path):
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    (tmp_path / "mine" / "sweep" / "broken.yaml").write_text("words: seed=0,1\n")
    with pytest.raises(UserError, match="must have one entry, run"):
        module.sweep(["sweep=broken"], [], open_catalogue([tmp_path / "mine"]))
