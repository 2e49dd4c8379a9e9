"""``ls``, ``show`` and ``cp`` say what the files say."""

import pytest

from kdrun.browse import KINDS, columns, cp, ls, show
from kdrun.catalogue import description, entries, matching, nearest, open_catalogue
from kdrun.cli import run as kdrun
from kdrun.errors import UserError


@pytest.fixture(scope="module")
def catalogue():
    return open_catalogue()


def test_ls_without_a_kind_counts_the_kinds(catalogue):
    lines = ls(catalogue, []).splitlines()
    assert f"methods    {len(catalogue.choices('method'))}  kdrun ls methods" in lines


@pytest.mark.parametrize("kind", KINDS)
def test_ls_names_every_choice(catalogue, kind):
    names = catalogue.choices(KINDS[kind])
    if not names:
        pytest.skip(f"no {kind} yet")
    shown = [line.split()[0] for line in ls(catalogue, [kind]).splitlines()]
    assert set(names) <= set(shown)


def test_ls_filters_by_pattern(catalogue):
    shown = [line.split()[0] for line in ls(catalogue, ["models", "resnet?"]).splitlines()]
    assert shown == ["resnet8"]
    assert "resnet8" in ls(catalogue, ["students", "snet8"])
    with pytest.raises(UserError, match="no method matches zzz"):
        ls(catalogue, ["methods", "zzz"])
    with pytest.raises(UserError, match="Did you mean methods?"):
        ls(catalogue, ["metods"])


def test_ls_tells_paper_and_kind_of_methods(catalogue):
    lines = {line.split()[0]: line for line in ls(catalogue, ["methods"]).splitlines()}
    assert "logits" in lines["kd"]
    assert "Hinton" in lines["kd"]
    assert "features" in lines["fitnet"]


def test_show_has_description_formula_and_options(catalogue):
    text = show(catalogue, ["method=kd"])
    assert "KL(softmax(z_t / T) || softmax(z_s / T))" in text
    row = next(line for line in text.splitlines() if line.startswith("  method.temperature"))
    assert row.split()[1:5] == ["4.0", "number", ">", "0"]
    assert "conf/method/kd.yaml, kdrun/methods/kd.py" in text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trainer=ddp", "trainer.devices        2      integer >= 1"),
        ("teacher=resnet8", "teacher.blocks"),
        ("launcher=joblib", "launcher.n_jobs"),
        ("sweeper=optuna", "sweeper.sampler.seed"),
        ("training=digits", "training.optimizer.lr"),
    ],
)
def test_show_knows_every_group(catalogue, word, expected):
    assert expected in show(catalogue, [word])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method"], "show takes one choice"),
        (["method=kdd"], "Did you mean method=kd?"),
        (["metod=kd"], "Did you mean method?"),
        ([], "show takes one choice"),
    ],
)
def test_show_refuses_in_one_line(catalogue, words, said):
    with pytest.raises(UserError) as refused:
        show(catalogue, words)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_cp_copies_and_never_overwrites(catalogue, tmp_path):
    target = tmp_path / "method" / "mine.yaml"
    cp(catalogue, ["method/kd", str(target)])
    assert target.read_text() == catalogue.path("method", "kd").read_text()
    with pytest.raises(UserError, match="exists"):
        cp(catalogue, ["method/kd", str(target)])
    with pytest.raises(UserError, match="Did you mean method=kd?"):
        cp(catalogue, ["method/kdd", str(tmp_path / "x.yaml")])
    assert open_catalogue([tmp_path]).choices("method") == sorted(
        [*catalogue.choices("method"), "mine"]
    )


def test_entries_find_values_and_comments(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "# What this file is.\n"
        "_target_: a.b\n"
        "plain: 1  # beside\n"
        "# above\n"
        "other: [1, 2]\n"
        "text: 'with # inside'  # outside\n"
        "block:\n  inner: {a: 1}\nempty: {}\n"
    )
    found = {entry.key: (entry.value, entry.comment) for entry in entries(path)}
    assert found == {
        "_target_": ("a.b", ""),
        "plain": ("1", "beside"),
        "other": ("[1, 2]", "above"),
        "text": ("'with # inside'", "outside"),
        "block.inner": ("{a: 1}", ""),
        "empty": ("{}", ""),
    }
    assert description(path) == "What this file is."


def test_every_shipped_config_describes_itself(catalogue):
    groups = [*catalogue.group_folders(), "launcher", "sweeper"]
    silent = [
        f"{group}/{name}"
        for group in groups
        for name in catalogue.choices(group)
        if not description(catalogue.path(group, name))
    ]
    assert silent == []


def test_names():
    assert nearest("temprature", ["temperature", "weight"]) == "temperature"
    assert nearest("KD", ["kd", "dkd"]) == "kd"
    assert nearest("zzz", ["kd"]) is None
    assert matching(["kd", "dkd", "at"], ["*kd"]) == ["kd", "dkd"]
    assert matching(["kd", "dkd"], ["d"]) == ["kd", "dkd"]
    assert columns([("a", "b"), ("long", "c")]) == "a     b\nlong  c"


@pytest.mark.parametrize("content", [b"x: [", b"\xff\xfe\x00", b"# fine\nx: {"])
@pytest.mark.parametrize("words", [["ls", "methods"], ["show", "method=mine"], ["method=mine"]])
def test_a_file_of_the_users_that_is_no_yaml_is_one_line(tmp_path, capsys, content, words) -> None:
    (tmp_path / "method").mkdir()
    path = tmp_path / "method" / "mine.yaml"
    path.write_bytes(content)
    assert kdrun(["--config-dir", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mine.yaml" in error
