"""What the shell is offered next."""

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.completion import complete

VERBS = ["ls", "show", "cp", "resume", "doctor"]


@pytest.fixture(scope="module")
def catalogue():
    return open_catalogue()


def offered(catalogue, line, word=None):
    typed = "" if line.endswith(" ") else line.split()[-1]
    return complete(line, typed if word is None else word, catalogue, VERBS)


def test_first_word_is_a_group_a_key_or_a_verb(catalogue):
    found = offered(catalogue, "kdrun ")
    assert {"method=", "student=", "ls ", "doctor ", "seed=", "-m "} <= set(found)
    assert offered(catalogue, "kdrun meth") == ["method="]
    assert "ls " not in offered(catalogue, "kdrun method=kd ")


def test_choices_of_a_group(catalogue):
    assert offered(catalogue, "kdrun method=sink") == ["method=sinkhorn"]
    # bash hands over only what follows the `=`.
    assert offered(catalogue, "kdrun method=sink", word="sink") == ["sinkhorn"]
    assert offered(catalogue, "kdrun student=resnet1", word="resnet1") == [
        name for name in catalogue.choices("student") if name.startswith("resnet1")
    ]


def test_options_are_those_of_the_chosen_config(catalogue):
    assert "method.temperature=" in offered(catalogue, "kdrun method=kd method.te")
    assert "method.beta=" in offered(catalogue, "kdrun method=dkd method.b")
    assert offered(catalogue, "kdrun method=kd method.beta") == []
    assert "teacher.checkpoint=" in offered(catalogue, "kdrun teacher.ch")


def test_sweeps_offer_several_values_and_launchers(catalogue):
    assert "method=kd,dkd" in offered(catalogue, "kdrun -m method=kd,dk")
    assert "launcher=joblib" in offered(catalogue, "kdrun -m launcher=jo")
    assert offered(catalogue, "kdrun launcher=jo") == []


def test_arguments_of_verbs(catalogue):
    assert offered(catalogue, "kdrun ls met") == ["methods "]
    assert "method=kd" in offered(catalogue, "kdrun show method=k")
    assert offered(catalogue, "kdrun cp meth") == ["method/"]
    assert "method/kd " in offered(catalogue, "kdrun cp method/k")
    assert offered(catalogue, "kdrun resume o") == []
