"""Typed words: what is read, and one line for each that cannot be."""

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.errors import UserError
from kdrun.overrides import network_choice, parse, parse_word, typed_packages


@pytest.fixture(scope="module")
def catalogue():
    return open_catalogue()


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("method.temperature=2.5", "method.temperature", 2.5),
        ("+method.temperature=1e-3", "method.temperature", 0.001),
        ("rerun=true", "rerun", True),
        ("training.clip_norm=null", "training.clip_norm", None),
        ("training.scheduler.milestones=[1,2]", "training.scheduler.milestones", [1, 2]),
        ("student.options={depth: 6}", "student.options", {"depth": 6}),
        ("output_dir='with space'", "output_dir", "with space"),
        ("student=resnet18", "student", "resnet18"),
        ("model@student=resnet18", "student", "resnet18"),
        ("student=timm/resnet18.a1_in1k", "student", "timm/resnet18.a1_in1k"),
        ("method=7", "method", "7"),
    ],
)
def test_reads(catalogue, word, key, value):
    override = parse_word(word, catalogue)
    assert (override.key, override.value) == (key, value)
    assert not override.is_sweep


@pytest.mark.parametrize(
    ("word", "values", "interval"),
    [
        ("seed=0,1,2", ("0", "1", "2"), False),
        ("seed=range(3)", ("0", "1", "2"), False),
        ("method=kd,dkd", ("kd", "dkd"), False),
        ("method=glob(*kd)", ("dkd", "kd"), False),
        ("method.temperature=interval(1,8)", ("1.0", "8.0"), True),
    ],
)
def test_reads_sweeps(catalogue, word, values, interval):
    override = parse_word(word, catalogue)
    assert set(values) <= set(override.values)
    assert override.interval is interval
    assert override.is_sweep


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("foo", "'=' is missing"),
        ("x=[1", "cannot be read"),
        ("=3", "not a key"),
        ("a b=3", "not a key"),
        ("~method.weight", "write method.weight=null"),
        ("--fast", "no such flag"),
        ("launcher=joblib", "goes with -m"),
        ("hydra.sweep.dir=x", "goes with -m"),
        ("training={epochs: 3}", "names one of the training configs"),
        ("seed=glob(*)", "configs of a group"),
        ("method=glob(zzz*)", "matches no method"),
        ("training.optimizer.lr=interval(0.1,0.01)", "from a number to a larger one"),
        ("training.optimizer.lr=interval(0.1,0.1)", "from a number to a larger one"),
        ("training.optimizer.lr=interval(nan,0.1)", "from a number to a larger one"),
        ("seed=range(3,1)", "holds no value"),
    ],
)
def test_refuses_in_one_line(catalogue, word, said):
    with pytest.raises(UserError) as refused:
        parse_word(word, catalogue)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_key_given_twice_is_a_mistake_under_any_spelling(catalogue):
    overrides, problems = parse(["student=resnet8", "+model@student=resnet20"], catalogue)
    assert len(overrides) == 1
    assert problems == ["student: given twice (student=resnet8, +model@student=resnet20)"]


def test_networks_from_elsewhere():
    choices = ["resnet8", "timm", "hf", "custom"]
    assert network_choice("resnet8", choices) == ("resnet8", {})
    assert network_choice("timm/a.b", choices) == ("timm", {"name": "a.b"})
    assert network_choice("hf/org/name", choices) == ("hf", {"name": "org/name"})
    assert network_choice("my.Net", choices) == ("custom", {"_target_": "my.Net"})
    assert network_choice("torchvision/x", choices) == ("torchvision/x", {})


def test_a_typed_path_permits_its_own_package_only(catalogue):
    overrides, _ = parse(["student=mine.nets.Net", "method=kd", "teacher=timm/x"], catalogue)
    assert typed_packages(overrides) == ["mine"]
