"""Composition and its checks: every mistake is named in one line, all of them at once."""

import pytest

from kdrun.catalogue import GROUPS, open_catalogue
from kdrun.config import compose
from kdrun.errors import ConfigErrors, UserError


@pytest.fixture(scope="module")
def catalogue():
    return open_catalogue()


def problems(catalogue, *words):
    with pytest.raises(ConfigErrors) as refused:
        compose(words, catalogue)
    return refused.value.problems


def test_defaults_are_valid_and_change_nothing(catalogue):
    config = compose([], catalogue)
    assert config.changes == []
    assert set(config.names) == set(GROUPS)
    assert config.names == catalogue.defaults()
    assert "hydra" not in config.values


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "teacher"])
def test_every_shipped_choice_is_valid(catalogue, group):
    wrong = {}
    for name in catalogue.choices(group):
        words = [f"{group}={name}"]
        # These configs are completed by what is typed.
        words += [f"{group}.name=x"] if name in ("timm", "torchvision") else []
        if name == "custom":
            words = [f"{group}=torch.nn.Identity"]
        # A data set on disk or on the hub must be told where it is.
        for _ in range(3):
            try:
                compose(words, catalogue)
                break
            except ConfigErrors as error:
                missing = [line for line in error.problems if "must be given" in line]
                if not missing or len(missing) < len(error.problems):
                    wrong[name] = error.problems
                    break
                words += [f"{line.split(':')[0]}=x" for line in missing]
    assert wrong == {}


def test_an_option_inside_what_was_set_to_null(catalogue):
    found = problems(catalogue, "recipe.stages=null", "recipe.stages.teacher_outputs._target_=x")
    assert "recipe.stages.teacher_outputs._target_: recipe.stages has no options" in found[0]


def test_all_mistakes_at_once(catalogue):
    found = problems(
        catalogue,
        "method=kdd",
        "student=resnet81",
        "training.epoch=3",
        "training.batch_size=0",
        "seed=a",
        "nonsense",
        "trainer.precision=17",
        "devices=2",
    )
    assert len(found) == 8
    assert all("\n" not in line for line in found)
    text = "\n".join(found)
    assert "method=kdd: no such method. Did you mean method=kd?" in text
    assert "student=resnet81: no such student. Did you mean student=resnet8?" in text
    assert "training.epoch: no such option of digits. Did you mean training.epochs?" in text
    assert "training.batch_size: must be integer >= 1, got 0" in text
    assert "seed: must be integer >= 0, got a" in text
    assert "trainer.precision: must be one of 32, 64, bf16, got 17" in text
    assert "devices: no such option. Did you mean trainer.devices?" in text


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("metod=kd", "Did you mean method?"),
        ("method.temperatur=2", "Did you mean method.temperature?"),
        ("+method.temperatur=2", "Did you mean method.temperature?"),
        ("method.temperature=0", "must be number > 0, got 0"),
        ("method.temperature=warm", "must be number > 0, got warm"),
        ("method.t_squared=1", "must be true or false, got 1"),
        ("seed.x=1", "seed has no options inside"),
        ("seed=1.5", "must be integer >= 0, got 1.5"),
        ("training.optimizer=3", "is a group of options"),
        ("training.optimizer.lr=-1", "must be number > 0"),
        ("training.optimizer.lrr=1", "Did you mean training.optimizer.lr?"),
        ("training.scheduler.name=cosin", "must be one of"),
        ("dataset.views.strng.flip=1", "Did you mean dataset.views.strong?"),
        ("model=resnet8", "teacher or student"),
        ("model.num_classes=3", "teacher or student"),
        ("recipe.stages.polish=1", "no such option"),
        ("student=timm", "student.name: must be given"),
        ("student=custom", "student._target_: must be a dotted path"),
        ("allow_packages=mine", "must be list of text"),
        ("seed=${nowhere}", "nowhere"),
        ("seed=1,2", "need -m"),
    ],
)
def test_one_line_for_one_mistake(catalogue, word, said):
    found = problems(catalogue, word)
    assert len(found) == 1, found
    assert said in found[0]
    assert "+" not in found[0]


def test_a_wrong_choice_does_not_make_its_options_wrong_too(catalogue):
    assert len(problems(catalogue, "method=kdd", "method.alpha=0.5")) == 1


def test_changes_are_told_relative_to_the_defaults(catalogue):
    config = compose(["method=dkd", "training.epochs=3", "seed=0", "method.beta=2"], catalogue)
    assert config.changes == [
        f"method: {catalogue.defaults()['method']} -> dkd",
        f"training.epochs: {compose([], catalogue).values['training']['epochs']} -> 3",
        "method.beta: 8.0 -> 2",
    ]


def test_a_whole_number_for_a_float_is_the_same_experiment(catalogue):
    whole = compose(["method.temperature=4"], catalogue).values
    assert whole == compose(["method.temperature=4.0"], catalogue).values
    assert isinstance(whole["method"]["temperature"], float)
    assert isinstance(whole["training"]["epochs"], int)


def test_interpolations_are_resolved(catalogue):
    config = compose(["teacher.seed=${seed}", "seed=5"], catalogue)
    assert config.values["teacher"]["seed"] == 5


def test_a_data_set_may_choose_training_but_what_is_typed_wins(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "defaults:\n  - override /training@_global_.training: smoke\n  - _self_\n"
        "_target_: kdrun.data.digits.Digits\n"
    )
    catalogue = open_catalogue([tmp_path])
    assert compose(["dataset=mine"], catalogue).names["training"] == "smoke"
    typed = compose(["dataset=mine", "training=digits"], catalogue)
    assert typed.names["training"] == "digits"


# -- networks and targets --------------------------------------------------------------------------


def test_networks_from_libraries(catalogue):
    config = compose(["student=timm/resnet18", "teacher=hf/org/name"], catalogue)
    assert config.names["student"] == "timm/resnet18"
    assert config.values["student"]["name"] == "resnet18"
    assert config.values["teacher"]["name"] == "org/name"
    assert config.values["student"]["init_from"] is None


def test_free_options_of_a_network_from_a_library(catalogue):
    words = ["student=timm/vit", "student.options.patch_size=4", "student.options.depth=6"]
    options = compose(words, catalogue).values["student"]["options"]
    assert options == {"patch_size": 4, "depth": 6}


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    """A module of the user's own on the path, never imported by these tests."""
    (tmp_path / "own_networks.py").write_text(
        "raise RuntimeError('imported')\n"
        "class Net:\n"
        "    def __init__(self, num_classes: int, *, width: int = 8, gate: bool = False): ...\n"
        "class Needs:\n"
        "    def __init__(self, num_classes, depth: int): ...\n"
        "class Moody:\n"
        "    def __init__(self, num_classes, *, mode: str = 'calm', seed: int = 0): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_networks"


def test_a_class_of_ones_own_by_its_dotted_path(catalogue, own_network):
    config = compose(["student=own_networks.Net", "student.width=4"], catalogue)
    assert config.values["student"]["_target_"] == "own_networks.Net"
    assert config.values["student"]["width"] == 4
    assert config.values["allow_packages"] == ["own_networks"]
    assert config.names["student"] == "own_networks.Net"


def test_arguments_of_ones_own_class_are_checked_from_its_source(catalogue, own_network):
    found = problems(catalogue, "student=own_networks.Net", "student.widht=4", "student.gate=maybe")
    assert any("Did you mean student.width?" in line for line in found)
    assert any("student.gate: must be true or false" in line for line in found)
    assert problems(catalogue, "student=own_networks.Needs") == [
        "student.depth: own_networks.Needs needs it (integer)"
    ]


def test_an_argument_that_would_never_arrive_is_refused(catalogue, own_network):
    """Teachers have a mode and a seed, so no network is built with such arguments."""
    assert compose(["student=own_networks.Moody"], catalogue).values["student"]["init_from"] is None
    words = ("student=own_networks.Moody", "student.mode=wild", "student.seed=3")
    said = "teachers have an option of this name, which no network is built with; "
    said += "rename the argument of own_networks.Moody"
    assert problems(catalogue, *words) == [f"student.mode: {said}", f"student.seed: {said}"]


@pytest.mark.parametrize(
    "word",
    [
        "method._target_=os.system",
        "teacher._target_=subprocess.run",
        "training.optimizer._target_=builtins.eval",
        "student._target_=torch.hub.load",
        "recipe.stages.teacher._target_=mine.Stage",
        "student._target_=torch.nn.__builtins__",
    ],
)
def test_targets_outside_the_list_are_refused(catalogue, word):
    found = problems(catalogue, word)
    assert len(found) == 1
    assert found[0].startswith(word.split("=")[0])


def test_targets_of_a_config_file_are_held_to_the_list(tmp_path):
    folder = tmp_path / "method"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "_target_: mine.methods.Mine\ninner: [{_target_: os.system}]\n"
    )
    catalogue = open_catalogue([tmp_path])
    assert "allow_packages=[mine]" in problems(catalogue, "method=mine")[0]
    found = problems(catalogue, "method=mine", "allow_packages=[mine]")
    assert found == [
        "method.inner._target_: os.system: nothing is built from Python's standard library"
    ]


def test_a_target_that_kdrun_does_not_have(catalogue):
    found = problems(catalogue, "method._target_=kdrun.data.streaming.os.system")
    assert found == ["method._target_: kdrun.data.streaming.os.system: no such class or function"]
    found = problems(catalogue, "method._target_=kdrun.store.write_atomically")
    assert found == [
        "method._target_: kdrun.store.write_atomically: of kdrun only architectures, data, layers, "
        "losses, methods, models, stages, tasks are built from"
    ]


def test_a_config_file_cannot_permit_packages(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(
        "# @package _global_\nallow_packages: [mine]\nmethod:\n  _target_: mine.Method\n"
    )
    catalogue = open_catalogue([tmp_path])
    assert problems(catalogue, "method=mine")[0] == (
        "allow_packages: is set by a config file; only the command line may"
    )


def test_another_optimiser_is_given_as_a_whole_node(catalogue):
    words = ["training.optimizer={_target_: torch.optim.AdamW, lr: 0.001, betas: [0.9, 0.99]}"]
    optimizer = compose(words, catalogue).values["training"]["optimizer"]
    assert optimizer == {"_target_": "torch.optim.AdamW", "lr": 0.001, "betas": [0.9, 0.99]}
    left_over = problems(catalogue, "training.optimizer._target_=torch.optim.AdamW")
    assert any(line.startswith("training.optimizer.momentum: no such option") for line in left_over)


# -- folders of one's own --------------------------------------------------------------------------


def test_own_folder_must_exist_and_not_hide_shipped_configs(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_catalogue([tmp_path / "nowhere"])
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "kd.yaml").write_text("_target_: kdrun.methods.kd.KD\n")
    with pytest.raises(UserError, match=r"kdrun itself has method/kd\.yaml"):
        open_catalogue([tmp_path])


@pytest.mark.parametrize(
    "text",
    ["a: [1", "defaults: [nothing/there]\na: 1", "- 1\n- 2", "defaults:\n  - override /nope: x\n"],
)
def test_a_broken_config_file_is_one_line(tmp_path, text):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(text)
    found = problems(open_catalogue([tmp_path]), "method=mine")
    assert len(found) == 1
    assert "\n" not in found[0]


def test_a_plugin_adds_configs_and_its_package(tmp_path, monkeypatch):
    from kdrun import catalogue as module

    (tmp_path / "plug" / "conf" / "method").mkdir(parents=True)
    for folder in ("plug", "plug/conf"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "plug" / "conf" / "method" / "extra.yaml").write_text("_target_: plug.Extra\n")
    information = tmp_path / "plug-1.0.dist-info"
    information.mkdir()
    (information / "entry_points.txt").write_text("[kdrun.config]\nplug = plug.conf\n")
    monkeypatch.syspath_prepend(tmp_path)
    module.plugin_packages.cache_clear()
    try:
        catalogue = open_catalogue()
        assert "extra" in catalogue.choices("method")
        assert compose(["method=extra"], catalogue).values["allow_packages"] == ["plug"]
    finally:
        module.plugin_packages.cache_clear()
