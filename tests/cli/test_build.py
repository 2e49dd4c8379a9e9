"""Objects from config nodes: within the allow-list, with one line for whatever is wrong."""

import pytest
from torch import nn

from kdrun.build import allowing, instantiate, resolve
from kdrun.errors import UserError


def test_builds_with_what_the_caller_adds():
    layer = instantiate(
        {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": None}, out_features=4
    )
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (3, 4)


def test_builds_nested_nodes_first():
    node = {
        "_target_": "torch.nn.TransformerEncoder",
        "num_layers": 1,
        "encoder_layer": {"_target_": "torch.nn.TransformerEncoderLayer", "d_model": 4, "nhead": 2},
        "enable_nested_tensor": False,
    }
    encoder = instantiate(node)
    assert isinstance(encoder.layers[0], nn.TransformerEncoderLayer)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("os.system", "standard library"),
        ("subprocess.Popen", "standard library"),
        ("kdrun.data.streaming.os.system", "comes from posix"),
        ("kdrun.store.write_atomically", "of kdrun only architectures, data, layers"),
        ("torch.load", "nothing is built from torch unless"),
        ("torch.nn.Linear.__init__", "double underscores"),
        ("torch.nn.Nothing", "torch.nn has no Nothing"),
        ("kdrun.data.nowhere.Thing", "kdrun.data has no nowhere"),
        ("kdrun.data.streaming.np", "is not a class or function"),
        ("Linear", "must be a dotted path"),
        (7, "must be a dotted path"),
        ("nobody_has_this.Net", "nothing is built from nobody_has_this"),
    ],
)
def test_refuses(target, said):
    with pytest.raises(UserError, match="(?s)" + said) as refused:
        instantiate({"_target_": target})
    assert "\n" not in str(refused.value)


def test_packages_can_be_allowed_for_a_while(tmp_path, monkeypatch):
    (tmp_path / "own_package.py").write_text(
        "import os\nclass Thing:\n    def __init__(self, size=1): self.size = size\n"
        "run = os.system\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="own_package"):
        resolve("own_package.Thing")
    with allowing(["own_package"]):
        assert instantiate({"_target_": "own_package.Thing", "size": 3}).size == 3
        with pytest.raises(UserError, match="comes from posix"):
            resolve("own_package.run")
    with pytest.raises(UserError, match="own_package"):
        resolve("own_package.Thing")


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"in_features": 1}, "missing a required argument: 'out_features'"),
        ({"in_features": 1, "out_features": 1, "colour": 2}, "unexpected keyword argument"),
        ({"in_features": 1, "out_features": 1, "_partial_": True}, "_partial_"),
    ],
)
def test_names_the_argument(node, said):
    with pytest.raises(UserError, match=f"torch.nn.Linear: .*{said}"):
        instantiate({"_target_": "torch.nn.Linear", **node})


def test_what_kdrun_supplies_cannot_be_given_too():
    node = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}
    with pytest.raises(UserError, match="in_features is set by kdrun"):
        instantiate(node, in_features=2)


def test_a_value_that_the_constructor_refuses():
    node = {"_target_": "kdrun.methods.kd.KD", "temperature": -1.0}
    with pytest.raises(UserError, match="temperature must be number > 0, got -1.0"):
        instantiate(node)


def test_a_node_without_target():
    with pytest.raises(UserError, match="without _target_"):
        instantiate({"size": 3})
