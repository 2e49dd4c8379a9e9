"""Runs on disk: found, compared, continued."""

import json

import pytest
import yaml

from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.errors import UserError
from kdrun.overrides import parse_word
from kdrun.runs import diff, differences, open_run, quoted, resume_config, stored_words


@pytest.fixture
def catalogue():
    return open_catalogue()


def make_run(root, words, catalogue, accuracy=None):
    config = compose(words, catalogue).values
    run = root / "digits" / "a-b" / "kd-00000000" / "seed0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "env.json").write_text(json.dumps({"command": " ".join(words)}))
    if accuracy is not None:
        result = {"networks": {"distilled": {"test": {"accuracy": accuracy}}}, "schema": 1}
        (run / "result.json").write_text(json.dumps(result))
    return run


def test_a_run_is_found_by_its_folder_or_a_file_in_it(tmp_path, catalogue):
    run = make_run(tmp_path, [], catalogue)
    assert open_run(str(run)) == run
    assert open_run(str(run / "config.yaml")) == run
    with pytest.raises(UserError, match=f"did you mean {run}"):
        open_run(str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        open_run(str(tmp_path / "nowhere"))


def test_diff_shows_what_differs(tmp_path, catalogue):
    first = make_run(tmp_path / "1", ["method.temperature=2"], catalogue, accuracy=90.0)
    second = make_run(tmp_path / "2", ["method.temperature=3"], catalogue, accuracy=91.5)
    text = diff(first, second)
    assert "method.temperature  2.0  3.0" in text
    assert "networks.distilled.test.accuracy  90     91.5    +1.5" in text
    assert "training" not in text
    assert diff(first, first) == "Config: the same\n\nResults: the same"


def test_diff_of_an_unfinished_run(tmp_path, catalogue):
    first = make_run(tmp_path / "1", [], catalogue)
    second = make_run(tmp_path / "2", ["seed=1"], catalogue, accuracy=1.0)
    assert "neither run is finished" in diff(first, first)
    assert "networks.distilled.test.accuracy  -      1" in diff(first, second)


def test_differences_names_leaves():
    first, second = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}
    assert list(differences(first, second)) == [("a.c", 2, 3), ("d", "unset", None)]


def test_resume_takes_the_words_of_the_run_and_its_place(tmp_path, catalogue, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["method.temperature=2", "rerun=true"]
    run = make_run(tmp_path / "with space", words, catalogue)
    assert stored_words(run) == words
    config, again = resume_config(run, stored_words(run), catalogue)
    assert config.values["output_dir"] == str(tmp_path / "with space")
    assert config.values["rerun"] is False
    assert compose(again, catalogue).values == config.values


def test_resume_in_the_usual_place_needs_no_output_dir(tmp_path, catalogue, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "outputs", ["seed=1"], catalogue)
    assert resume_config(run, ["seed=1"], catalogue)[1] == ["seed=1"]


def test_resume_refuses_where_the_configs_have_changed(tmp_path, catalogue):
    run = make_run(tmp_path, ["training.epochs=3"], catalogue)
    with pytest.raises(UserError, match=r"training\.epochs \(3 -> 5\)"):
        resume_config(run, ["training.epochs=5"], catalogue)


@pytest.mark.parametrize(
    "text", ["plain/path", "with space", 'quote"d', "a,b", "back\\slash", "{x}"]
)
def test_quoted_text_is_read_back_as_it_was(catalogue, text):
    assert parse_word(f"output_dir={quoted(text)}", catalogue).value == text
