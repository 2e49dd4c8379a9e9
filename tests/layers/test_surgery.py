from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdrun.layers.surgery import find_classifier, find_pooled_map, insert, replace_module
from tests.methods.training import ConvNet

SAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class FunctionalPooling(nn.Module):
    """A network that pools without a module, after a rectifier without one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 6, 3)
        self.last = nn.Conv2d(6, 4, 3)
        self.shuffle = nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.shuffle(self.last(self.features(inputs).relu()).relu())
        return self.head(maps.mean(dim=(2, 3)))


def test_the_pooled_map_is_what_the_classifier_averages() -> None:
    location, shape = find_pooled_map(ConvNet(width=4), SAMPLE)
    assert (location, shape) == ("stage3", (2, 16, 2, 2))


def test_the_outermost_of_equal_maps_is_taken() -> None:
    network = FunctionalPooling()
    network.shuffle = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity()))
    assert find_pooled_map(network, SAMPLE)[0] == "shuffle"


def test_tiny_features_are_told_apart() -> None:
    network = FunctionalPooling()
    network.features = nn.Conv2d(1, 4, 3)
    network.last = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        for parameter in network.features.parameters():
            parameter.mul_(1e-7)
        network.last.bias.zero_()
    assert find_pooled_map(network, SAMPLE)[0] == "shuffle"


def test_networks_of_torchvision_are_read_too() -> None:
    models = pytest.importorskip("torchvision.models")
    sample = torch.randn(2, 3, 64, 64)
    network = models.resnet18(num_classes=7)
    assert find_classifier(network, sample) == "fc"
    assert find_pooled_map(network, sample) == ("layer4", (2, 512, 2, 2))


def test_a_classifier_that_averages_no_map_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="does not read the spatial average"):
        find_pooled_map(network, SAMPLE)


def test_the_network_is_left_as_it_was() -> None:
    network = ConvNet(width=4)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    find_pooled_map(network, SAMPLE)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("location", ["stage3", "input:pool"])
def test_what_is_inserted_works_before_the_pooling(location: str) -> None:
    network = ConvNet(width=4).eval()
    expected = network.classifier(
        2 * network.pool(network.stage3(network.stage2(network.stage1(network.stem(SAMPLE)))))
    )

    class Double(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return 2 * maps

    double = Double()
    path = insert(network, location, double)
    assert network.get_submodule(path) is double
    torch.testing.assert_close(network(SAMPLE), expected)


def test_a_module_deep_inside_is_replaced() -> None:
    network = ConvNet(width=4)
    replace_module(network, "stage2.2", nn.Identity())
    assert isinstance(network.stage2[2], nn.Identity)
    assert len(network.stage2) == 3
