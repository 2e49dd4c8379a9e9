"""From a config node to a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdrun.build import allowing
from kdrun.checks import OF_ROLES
from kdrun.errors import UserError
from kdrun.models import ROLE_KEYS, build_model
from kdrun.models.mlp import MLP
from kdrun.models.small_cnn import SmallCNN

CNN = "kdrun.models.small_cnn.SmallCNN"


class PlainNetwork(nn.Module):
    """Somebody's own network: it asks for nothing."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(width, 7)


def not_a_network(num_classes: int) -> int:
    return num_classes


def test_the_data_set_fills_in_what_the_node_leaves_out_or_null() -> None:
    node = {"_target_": CNN, "num_classes": None, "widths": [4]}
    network = build_model(node, num_classes=5, input_shape=(2, 8, 8))
    assert isinstance(network, SmallCNN)
    assert network.stages[0][0].in_channels == 2
    assert network.classifier.out_features == 5
    network = build_model(
        {"_target_": "kdrun.models.mlp.MLP", "hidden": []}, num_classes=5, input_shape=(2, 8, 8)
    )
    assert isinstance(network, MLP)
    assert network.classifier.in_features == 128


def test_what_the_node_says_wins() -> None:
    node = {"_target_": CNN, "num_classes": 9, "in_channels": 3}
    network = build_model(node, num_classes=5, input_shape=(1, 8, 8))
    assert network.classifier.out_features == 9
    assert network.stages[0][0].in_channels == 3


def test_entries_of_the_role_are_not_arguments() -> None:
    role = {"checkpoint": None, "init_from": "x", "mode": "eval", "seed": 3, "weights": "last"}
    role |= {"allow_chance": False, "finetune": False}
    network = build_model({"_target_": CNN, **role}, num_classes=5, input_shape=(1, 8, 8))
    assert isinstance(network, SmallCNN)


def test_a_class_of_the_users_own_is_used_as_it_is() -> None:
    with allowing([PlainNetwork.__module__.split(".")[0]]):
        node = {"_target_": f"{PlainNetwork.__module__}.PlainNetwork", "width": 2}
        network = build_model(node, num_classes=5, input_shape=(1, 8, 8))
    assert (network.head.in_features, network.head.out_features) == (2, 7)


def test_a_target_of_torchvision_itself_keeps_its_classes() -> None:
    network = build_model(
        {"_target_": "torchvision.models.shufflenet_v2_x0_5"}, num_classes=5, input_shape=(3, 8, 8)
    )
    assert network.fc.out_features == 1000


def test_images_are_asked_for_where_there_are_none() -> None:
    with pytest.raises(UserError, match=r"SmallCNN reads images.*\(13,\).*mlp"):
        build_model({"_target_": CNN}, num_classes=5, input_shape=(13,))
    node = {"_target_": "kdrun.models.mlp.MLP"}
    assert build_model(node, num_classes=5, input_shape=(13,)).layers[0][0].in_features == 13


def test_what_is_no_network_is_refused() -> None:
    with allowing([__name__.split(".")[0]]), pytest.raises(UserError, match="int, not a network"):
        build_model({"_target_": f"{__name__}.not_a_network"}, num_classes=5, input_shape=(1, 8, 8))
    with pytest.raises(UserError, match="needs _target_"):
        build_model({"widths": [4]}, num_classes=5, input_shape=(1, 8, 8))


def test_a_wrong_shape_of_network_is_one_line() -> None:
    node = {"_target_": "kdrun.models.wide_resnet.WideResNet", "depth": 17}
    with pytest.raises(UserError, match="6n \\+ 4, not 17") as caught:
        build_model(node, num_classes=5, input_shape=(3, 8, 8))
    assert "\n" not in str(caught.value)


def test_building_depends_on_the_seed_alone() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(build_model({"_target_": CNN}, num_classes=5, input_shape=(1, 8, 8)))
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_network_reads_one_of_several_inputs() -> None:
    shapes = {"image": (1, 8, 8), "audio": (13,)}
    node = {"_target_": "kdrun.models.mlp.MLP", "reads": "audio"}
    network = build_model(node, num_classes=5, input_shape=shapes)
    assert network.layers[0][0].in_features == 13
    with pytest.raises(UserError, match=r"reads=video: a sample of this data set has image, audio"):
        build_model({**node, "reads": "video"}, num_classes=5, input_shape=shapes)
    with pytest.raises(UserError, match=r"reads=audio: a sample of this data set is one tensor"):
        build_model(node, num_classes=5, input_shape=(13,))


def test_what_is_kept_from_constructors_is_what_the_command_line_keeps_for_roles() -> None:
    assert set(ROLE_KEYS) == OF_ROLES - {"reads"}
