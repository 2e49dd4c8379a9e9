"""The installed command: exit statuses, speed, and what it does not import."""

import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import kdrun

COMMAND = [sys.executable, "-m", "kdrun"]

IMPORTED = """
import sys
from kdrun.cli import run
status = run(sys.argv[1:])
heavy = ("torch", "lightning", "numpy", "optuna", "ray", "submitit", "joblib", "sklearn")
print("imported:", *[name for name in heavy if name in sys.modules])
sys.exit(status)
"""


def kdrun_command(*words, folder, **environment):
    return subprocess.run(
        [*COMMAND, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_alone_it_says_in_ten_lines_what_it_is(tmp_path):
    done = kdrun_command(folder=tmp_path)
    assert done.returncode == 0
    assert 8 <= len(done.stdout.splitlines()) <= 10
    assert done.stdout.count("  kdrun ") >= 5
    assert list(tmp_path.iterdir()) == []


def test_first_words_of_the_answer_are_commands_that_work():
    from kdrun.catalogue import open_catalogue
    from kdrun.config import compose
    from kdrun.help import FIRST_WORDS
    from kdrun.overrides import parse

    lines = [
        line.split("   ")[0].split() for line in FIRST_WORDS.splitlines() if "  kdrun " in line
    ]
    runs = [line[1:] for line in (" ".join(words).split() for words in lines) if "=" in line[1]]
    assert len(runs) >= 2
    for words in runs:
        compose(words, open_catalogue())
    assert parse(["method=kd,dkd", "seed=0,1,2"], open_catalogue())[1] == []


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["method=kdd", "seed=-1", "metod=kd"], 2, "Did you mean method=kd?"),
        (["ls", "methods"], 0, "sinkhorn"),
        (["show", "method=sinkhorn"], 0, "method.epsilon"),
        (["--help"], 0, "--config-dir"),
        (["config", "method=kd"], 0, "_target_: kdrun.methods.kd.KD"),
    ],
)
def test_answers_without_importing_torch(words, status, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert said in (done.stderr if status else done.stdout)
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
    assert list(tmp_path.iterdir()) == []


HYDRA_ALONE = """
from hydra import compose, initialize_config_dir
with initialize_config_dir({folder!r}, version_base="1.3"):
    compose("config")
"""


def cpu_seconds(*commands):
    """The least processor time of a few calls of each, in turn: the machine may have other work."""
    least = [math.inf] * len(commands)
    for _ in range(6):
        for number, command in enumerate(commands):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, capture_output=True, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            least[number] = min(least[number], spent)
    return least


def test_a_mistake_is_told_about_as_fast_as_hydra_starts(tmp_path):
    # An empty Hydra program takes 0.3 s where half a second is what a user may wait.
    (tmp_path / "config.yaml").write_text("a: 1\n")
    hydra, mistake, listing, shown = cpu_seconds(
        [sys.executable, "-c", HYDRA_ALONE.format(folder=str(tmp_path))],
        [*COMMAND, "method=kdd", "method.alpha=2"],
        [*COMMAND, "ls", "methods"],
        [*COMMAND, "--help"],
    )
    assert mistake < 1.6 * hydra
    assert listing < 0.8 * hydra
    assert shown < 0.6 * hydra


# -- in this process -------------------------------------------------------------------------------


def cli(*words):
    from kdrun.cli import run

    return run(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lst"], "lst: no such command. Did you mean ls?"),
        (["sinkhorn"], "Did you mean method=sinkhorn?"),
        (["zzz"], "zzz: no such command. (commands: ls, show"),
        (["--fast"], "--fast: no such flag"),
        (["method=kd", "--fast"], "--fast: no such flag"),
        (["method=kd", "student"], "student: '=' is missing"),
        (["--config-dir"], "--config-dir needs a folder"),
        (["--config-dir", "nowhere", "ls"], "--config-dir nowhere: no such folder"),
        (["resume"], "resume takes the directory of a run"),
        (["resume", "nowhere"], "nowhere is not a run"),
        (["diff", "a"], "diff takes two runs"),
        (["show"], "show takes one choice"),
        (["cp", "a"], "cp takes a config and a destination"),
        (["launcher=joblib", "seed=0"], "goes with -m"),
    ],
)
def test_mistakes_have_status_2_and_one_line(words, said, capsys):
    assert cli(*words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


def test_version_and_help(capsys):
    assert cli("--version") == 0
    assert capsys.readouterr().out == f"kdrun {kdrun.__version__}\n"
    assert cli("--help") == 0
    text = capsys.readouterr().out
    assert "complete -o nospace -C 'kdrun complete' kdrun" in text
    assert "doctor" in text
    assert max(map(len, text.splitlines())) <= 100


def test_flags_may_stand_anywhere(tmp_path, capsys):
    (tmp_path / "method").mkdir()
    text = "# One of mine.\n_target_: kdrun.methods.kd.KD\ntemperature: 2.0\n"
    (tmp_path / "method" / "mine.yaml").write_text(text)
    assert cli("ls", "methods", "mine", f"--config-dir={tmp_path}") == 0
    assert "mine" in capsys.readouterr().out
    assert cli("--config-dir", str(tmp_path), "config", "method=mine") == 0
    assert "temperature: 2.0" in capsys.readouterr().out


def test_a_run_gets_the_config_the_names_and_the_command_that_repeats_it(
    monkeypatch, tmp_path, capsys
):
    import kdrun.experiment
    from kdrun.build import allowing, resolve

    (tmp_path / "own_net.py").write_text(
        "class Net:\n    def __init__(self, width: int = 1): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen = {}

    def run_experiment(config, **told):
        seen.update(told, config=config)
        with allowing(config["allow_packages"]):
            seen["allowed"] = resolve("own_net.Net")
        return {"objective": 1.0, "directory": "outputs/somewhere"}

    monkeypatch.setattr(kdrun.experiment, "run_experiment", run_experiment)
    words = ["student=own_net.Net", "student.width=3", "seed=0"]
    assert cli(*words, "--config-dir", str(tmp_path)) == 0
    assert seen["config"]["student"]["width"] == 3
    assert seen["names"]["student"] == "own_net.Net"
    assert seen["overrides"] == words
    assert seen["command"] == ["--config-dir", str(tmp_path), *words]
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:] == ["student.width: unset -> 3"]
    assert shown[0].startswith("student: ")


def test_statuses_of_a_run_that_ends_early(monkeypatch, capsys):
    import kdrun.experiment
    from kdrun.errors import Interrupted, UserError

    def ending_in(error):
        def run_experiment(config, **told):
            raise error

        monkeypatch.setattr(kdrun.experiment, "run_experiment", run_experiment)

    ending_in(UserError("no such file"))
    assert cli("seed=0") == 2
    assert capsys.readouterr().err == "no such file\n"
    ending_in(Interrupted("kdrun seed=0", signal_number=15))
    assert cli("seed=0") == 143
    assert "continue with: kdrun seed=0" in capsys.readouterr().err
    ending_in(ZeroDivisionError("broken"))
    assert cli("seed=0") == 1
    assert "Traceback" in capsys.readouterr().err


def test_all_processes_but_the_first_are_silent(monkeypatch, capsys):
    import kdrun.experiment
    from kdrun.errors import UserError

    def run_experiment(config, **told):
        print("progress")
        raise UserError("no")

    monkeypatch.setattr(kdrun.experiment, "run_experiment", run_experiment)
    monkeypatch.setenv("RANK", "1")
    assert cli("seed=1") == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert cli("seed=1") == 2
    assert "progress" in capsys.readouterr().out


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m kdrun show method=sinkhorn | head -1",
        shell=True,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("method=sinkhorn")
