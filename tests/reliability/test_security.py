"""What a file or a config from elsewhere must not be able to do, and what must not get out."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from kdrun.build import instantiate
from kdrun.cli import run as kdrun
from kdrun.errors import UserError
from kdrun.files import write_json
from kdrun.identity import run_directory
from kdrun.job import Record
from kdrun.redaction import redact, remember_secrets
from kdrun.training_state import read_checkpoint
from tests.tiny import WORDS, Training, run, tiny_config

# -- pickles ---------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def plant(path: Path, target: Path, form: str) -> None:
    content = {"state_dict": {"weight": torch.zeros(2)}, "key": Bomb(target)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("option", ["teacher.checkpoint", "student.init_from"])
def test_weights_that_carry_code_run_nothing(tmp_path, capfd, option, form) -> None:
    target = tmp_path / "boom"
    plant(tmp_path / "weights.pt", target, form)
    words = [*WORDS, f"{option}={tmp_path / 'weights.pt'}", f"output_dir={tmp_path / 'out'}"]
    if option == "student.init_from":
        words.append("method=ls")  # No teacher has to be trained first.
    assert kdrun(words) == 2
    error = capfd.readouterr().err
    assert not target.exists()
    assert "Traceback" not in error and "weights.pt" in error and error.count("\n") == 1


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_planted_checkpoint_runs_nothing(tmp_path: Path, form: str) -> None:
    target = tmp_path / "boom"
    plant(tmp_path / "last.ckpt", target, form)
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt", "tiny")
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        Training(tmp_path).run()
    assert not target.exists()


def test_a_planted_checkpoint_with_a_right_checksum_runs_nothing(tmp_path: Path) -> None:
    from kdrun.training_state import write_checkpoint

    target = tmp_path / "boom"
    write_checkpoint(tmp_path / "last.ckpt", {"key": Bomb(target)})
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt", "tiny")
    assert not target.exists()


def test_the_bomb_works(tmp_path: Path) -> None:
    """Else the tests above would show nothing."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()


# -- targets ---------------------------------------------------------------------------------------

FORBIDDEN = (
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "shutil.rmtree",
    "kdrun.store.make_once",
    "kdrun.launch.launch",
    "torch.hub.load",
    "torch.load",
    "torch.nn.__class__",
    "numpy.load",
    "pickle.loads",
    "timm.__builtins__",
    "../evil.Thing",
    "evil",
)


@pytest.mark.parametrize("target", FORBIDDEN)
def test_a_target_outside_the_list_is_refused_everywhere(tmp_path, capsys, target) -> None:
    assert kdrun(["config", f"student._target_={target}"]) == 2
    from_words = capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(f"_target_: {target}\n")
    assert kdrun(["config", "--config-dir", str(tmp_path), "student=mine"]) == 2
    from_file = capsys.readouterr().err
    for error in (from_words, from_file):
        assert target.rpartition(".")[2] in error and "Traceback" not in error
    with pytest.raises(UserError):
        instantiate({"_target_": target})


def test_a_target_hidden_in_an_argument_is_refused(tmp_path, capsys) -> None:
    target = tmp_path / "boom"
    assert kdrun(["config", f"training.optimizer.lr={{_target_: os.mkdir, path: '{target}'}}"]) == 2
    with pytest.raises(UserError, match="standard library"):
        instantiate({"_target_": "torch.nn.Linear", "in_features": {"_target_": "os.mkdir"}})
    assert not target.exists()


# -- names that become folders ---------------------------------------------------------------------

TRAVERSALS = ("../../x", "..", ".", "a/../../../x", "/etc/passwd", "a\\..\\b", "x\0y", "~/x")


@pytest.mark.parametrize("name", TRAVERSALS)
@pytest.mark.parametrize("group", ["dataset", "teacher", "student", "method"])
def test_no_name_leads_out_of_the_output_directory(tmp_path, group, name) -> None:
    config = tiny_config(tmp_path)
    directory = run_directory(config.values, config.names | {group: name})
    inside = os.path.normpath(directory)
    assert Path(inside).is_relative_to(tmp_path)
    assert len(Path(inside).relative_to(tmp_path).parts) == 4


@pytest.mark.parametrize("name", [name for name in TRAVERSALS if "\0" not in name])
@pytest.mark.parametrize("group", ["dataset", "method", "student", "training", "recipe"])
def test_a_choice_outside_the_tree_is_no_choice(tmp_path, capsys, group, name) -> None:
    (tmp_path / "x.yaml").write_text("epochs: 1\n")
    deep = tmp_path / "a" / "b"
    (deep / group).mkdir(parents=True)
    assert kdrun(["config", "--config-dir", str(deep), f"{group}={name}"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", ".hidden", "a/b", "a\nb", ""])
def test_no_stage_leads_out_of_the_run(tmp_path, capsys, name) -> None:
    """Also none of those that a stage is made of."""
    stage = {"_target_": "kdrun.stages.evaluate.Evaluate"}
    rounds = {"_target_": "kdrun.stages.rounds.Rounds", "stages": {name: stage}}
    (tmp_path / "recipe").mkdir()
    for stages in ({name: stage}, {"rounds": rounds}):
        (tmp_path / "recipe" / "mine.yaml").write_text(yaml.safe_dump({"stages": stages}))
        assert kdrun(["config", "--config-dir", str(tmp_path), "recipe=mine"]) == 2
        error = capsys.readouterr().err
        assert f"recipe.stages: {name!r} is no name of a stage" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["../../x", "../x.yaml", "/etc/passwd"])
def test_a_table_outside_the_tree_is_one_line(tmp_path, capsys, name, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.parent.iterdir())
    assert kdrun(["table", name]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(tmp_path.parent.iterdir()) == before and not list(tmp_path.iterdir())


# -- secrets ---------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "AWS_SECRET_ACCESS_KEY": 'wJalr"XUtnFEMI/K7MDENG\\bPxRfiCY',
    "MLFLOW_TRACKING_PASSWORD": "correct horse battery",
    "OPENAI_API_KEY": "sk-proj-abcdefgh",
    "GITHUB_PAT": "ghp_012345678901",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return list(SECRETS.values())


def test_secrets_are_in_no_file_of_a_run(tmp_path, secrets, monkeypatch, capsys) -> None:
    """Typed, printed, in the difference of the sources, and in an error: in no file."""
    from kdrun import experiment, provenance

    difference = "+key = '" + "'\n+key = '".join(secrets)
    monkeypatch.setattr(provenance, "_git", lambda directory, *words: difference)
    config = tiny_config(tmp_path, "method=ls")
    said = []

    def tell(self: experiment.Console, text: str, real=experiment.Console.say) -> None:
        said.append(text)
        real(self, f"{text} {' '.join(secrets)}")

    monkeypatch.setattr(experiment.Console, "say", tell)
    command = ["method=ls", *(f"note={value}" for value in secrets)]
    experiment.run_experiment(config.values, names=config.names, overrides=command, command=command)
    assert said
    capsys.readouterr()
    assert kdrun(["report", str(tmp_path), "--html"]) == 0
    told = capsys.readouterr().out
    assert not any(value in told for value in secrets)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"env.json", "config.yaml", "log.txt", "result.json", "overrides.txt"} <= names
    assert "report.html" in names
    assert "[HF_TOKEN removed]" in next(p for p in files if p.name == "log.txt").read_text()
    assert "[HF_TOKEN removed]" in next(p for p in files if p.name == "env.json").read_text()
    for path in files:
        content = path.read_bytes().decode("latin-1")
        for value in secrets:
            assert value not in content, path
            assert value.replace("\\", "\\\\").replace('"', '\\"') not in content, path


def test_secrets_in_a_config_are_removed_by_the_name_of_their_entry(tmp_path: Path) -> None:
    remember_secrets({"logger": {"api_key": "swordfish-1234"}, "x": [{"token": "opensesame"}]})
    write_json(tmp_path / "a.json", {"command": "kdrun logger.api_key=swordfish-1234"})
    assert "swordfish" not in (tmp_path / "a.json").read_text()
    assert redact("say opensesame") == "say [token removed]"


def test_secrets_in_a_config_are_in_no_file_of_a_run(tmp_path: Path) -> None:
    from kdrun.experiment import run_experiment

    config = tiny_config(tmp_path, "method=ls")
    values = config.values | {"logger": {"name": "csv", "api_key": "sk-proj-0123456789"}}
    words = ["method=ls", "+logger.api_key=sk-proj-0123456789"]
    run_experiment(values, names=config.names, overrides=words, command=words)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "[api_key removed]" in next(p for p in files if p.name == "config.yaml").read_text()
    assert not [path for path in files if b"sk-proj-0123456789" in path.read_bytes()]


def test_secrets_are_in_no_record_of_a_sweep(tmp_path: Path, secrets: list[str]) -> None:
    Record(0, secrets, error=secrets[0], trace="\n".join(secrets)).write(tmp_path)
    content = (tmp_path / "0.json").read_text()
    assert all(value not in content for value in secrets)


def test_ordinary_variables_and_entries_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "certainly")
    monkeypatch.setenv("KEYBOARD", "qwertyuiop")
    monkeypatch.setenv("API_KEY", "short")
    remember_secrets({"eos_token": "<|endoftext|>", "keyword": "something long"})
    text = f"certainly qwertyuiop short <|endoftext|> something long {os.environ.get('PWD', '')}"
    assert redact(text) == text


def test_a_run_without_secrets_is_written_as_it_is(tmp_path: Path) -> None:
    _, directory = run(tmp_path, "method=ls")
    stored = yaml.safe_load((directory / "config.yaml").read_text())
    assert stored == tiny_config(tmp_path, "method=ls").values
