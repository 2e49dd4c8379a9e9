"""Reading and replacing activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kdrun.layers.layout import Layout
from kdrun.layers.taps import attach, replace, tap_layout, tap_points


class Network(nn.Module):
    """Two stages that say where they are, with in-place rectifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(2, 3, 1, stride=2), nn.ReLU(inplace=True))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))

    def tap_points(self) -> dict[str, str]:
        return {
            "stage1": "layer1",
            "stage1.preactivation": "input:layer1.2",
            "stage2": "layer2",
            "penultimate": "input:head",
        }


class Block(nn.Module):
    """Gives a tuple, as many blocks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, *, hidden: Tensor) -> tuple[Tensor, str]:
        return self.inner(hidden), "rest"


class TokenNetwork(nn.Module):
    """A class token and a 2x2 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        hidden, rest = self.block(hidden=x)
        assert rest == "rest"
        return hidden[:, 0]

    def tap_points(self) -> dict[str, str]:
        return {"stage1": "block"}

    def tap_layout(self) -> Layout:
        return Layout(special_tokens=1)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_features_come_in_the_order_asked_and_keep_their_graph(network, inputs) -> None:
    taps = attach(network, ("penultimate", "stages"))
    with taps:
        logits = network(inputs)
    features = taps.collect()
    assert list(features) == ["penultimate", "stage1", "stage2"]
    assert features["stage1"].shape == (5, 2, 4, 4)
    assert torch.equal(network.head(features["penultimate"]), logits)
    features["stage1"].sum().backward()
    assert network.layer1[0].weight.grad is not None


def test_taps_change_nothing(network, inputs) -> None:
    untouched = copy.deepcopy(network)
    expected = untouched(inputs)
    expected.sum().backward()
    with attach(network, ("stages", "stage1.preactivation", "module:layer1.1", "input:layer2")):
        logits = network(inputs)
    logits.sum().backward()
    assert torch.equal(logits, expected)
    for tapped, plain in zip(network.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(tapped.grad, plain.grad)


def test_in_place_rectifiers_do_not_overwrite_what_is_tapped(network, inputs) -> None:
    taps = attach(network, ("stage1.preactivation", "module:layer1.1", "module:layer2.0"))
    with taps:
        network(inputs)
    assert all(feature.min() < 0 for feature in taps.collect().values())


def test_only_what_could_overwrite_a_declared_tap_works_out_of_place(network) -> None:
    rectifiers = network.layer1[2], network.layer2[1]
    for names, inplace in {
        ("stages", "penultimate"): [True, True],
        ("stage1.preactivation",): [False, True],
        ("module:layer1.1",): [False, False],
    }.items():
        taps = attach(network, names)
        assert [module.inplace for module in rectifiers] == inplace
        taps.remove()
        assert [module.inplace for module in rectifiers] == [True, True]


def test_nothing_is_recorded_outside_the_context(network, inputs) -> None:
    taps = attach(network, ("stages",))
    network(inputs)
    with pytest.raises(RuntimeError, match="stage1.*did not run"):
        taps.collect()
    with taps:
        network(inputs)
    network(2 * inputs)
    first = taps.collect()["stage1"]
    with taps:
        network(inputs)
    assert torch.equal(first.relu(), taps.collect()["stage1"])


def test_a_second_forward_overwrites_the_first(network, inputs) -> None:
    network.eval()
    taps = attach(network, ("stage2",))
    with taps:
        network(inputs)
        network(2 * inputs)
    assert torch.equal(taps.collect()["stage2"], network.layer2(network.layer1(2 * inputs)))


def test_collect_forgets(network, inputs) -> None:
    taps = attach(network, ("stage1",))
    with taps:
        network(inputs)
    taps.collect()
    with pytest.raises(RuntimeError, match="did not run"):
        taps.collect()


def test_remove_leaves_nothing_behind(network, inputs) -> None:
    taps = attach(network, ("stages", "stage1.preactivation"))
    taps.remove()
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert network.layer1[2].inplace


def test_a_copy_of_a_tapped_network_does_not_disturb_the_taps(network, inputs) -> None:
    taps = attach(network, ("stage1",))
    copied = copy.deepcopy(network)
    with taps:
        network(inputs)
    copied(3 * inputs)
    assert torch.equal(taps.collect()["stage1"], copy.deepcopy(network).layer1(inputs))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stage3", "no tap stage3.*did you mean stage2"),
        ("stages.norm", "no tap stage1.norm"),
        ("penultimat", "did you mean penultimate"),
        ("module:layer9", "no sub-module layer9 in Network; did you mean layer2"),
        ("input:nowhere", "no sub-module nowhere"),
    ],
)
def test_unknown_names_are_told_with_those_there_are(network, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        attach(network, (name,))
    assert "\n" not in str(caught.value)


def test_tuples_and_keyword_inputs_are_read() -> None:
    network = TokenNetwork()
    taps = attach(network, ("module:block", "input:block"))
    inputs = torch.randn(2, 5, 3)
    with taps:
        network(inputs)
    features = taps.collect()
    assert torch.equal(features["module:block"], network.block.inner(inputs))
    assert torch.equal(features["input:block"], inputs)


def test_forms_of_a_token_feature() -> None:
    network, inputs = TokenNetwork(), torch.randn(2, 5, 3)
    assert tap_layout(network) == Layout(special_tokens=1)
    shapes = {"stage1": (2, 3, 2, 2), "stage1.map": (2, 3, 2, 2)}
    shapes |= {"stage1.tokens": (2, 5, 3), "stage1.raw": (2, 5, 3), "stages.tokens": (2, 5, 3)}
    for name, shape in shapes.items():
        taps = attach(network, (name,))
        with taps:
            network(inputs)
        assert {n: tuple(f.shape) for n, f in taps.collect().items()} == {"stage1": shape}
        taps.remove()


def test_one_tap_in_two_forms_is_refused() -> None:
    with pytest.raises(ValueError, match="both as map and tokens"):
        attach(TokenNetwork(), ("stages", "stage1.tokens"))


def test_a_network_that_declares_no_taps_needs_a_sample() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Sequential does not declare its taps"):
        tap_points(network)
    attach(network, ("module:0",))  # a path needs none
    assert tap_points(network, torch.zeros(2, 3)) == {"penultimate": "input:2"}


def test_replacing_an_output_and_an_input(network, inputs) -> None:
    expected = network.head(torch.ones(5, 3))
    with replace(network, "layer2", torch.ones_like):
        assert torch.equal(network(inputs), expected)
    with replace(network, "input:head", torch.ones_like):
        assert torch.equal(network(inputs), expected)
    assert not torch.equal(network(inputs), expected)
    assert not network.layer2._forward_hooks
    assert not network.head._forward_pre_hooks


def test_gradients_pass_through_the_replacing_function(network, inputs) -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    with replace(network, "layer1", lambda feature: feature * scale):
        network(inputs).sum().backward()
    assert scale.grad is not None and scale.grad != 0


def test_replacing_keeps_the_rest_of_a_tuple() -> None:
    network = TokenNetwork()
    with replace(network, "block", torch.zeros_like):
        assert not network(torch.randn(2, 5, 3)).any()  # the network checks the rest


class Silent(nn.Module):
    """Two modules that give no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.empty = Giving(None), Giving(())

    def forward(self, x: Tensor) -> Tensor:
        self.nothing(x)
        self.empty(x)
        return x


class Giving(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> object:
        return self.value


@pytest.mark.parametrize(("path", "kind"), [("nothing", "NoneType"), ("empty", "tuple")])
def test_a_tap_where_there_is_no_tensor_says_so(inputs, path: str, kind: str) -> None:
    network = Silent()
    with attach(network, (f"module:{path}",)), pytest.raises(ValueError, match=f"a {kind}$"):
        network(inputs)


def test_replacing_with_nothing_is_an_error(network, inputs) -> None:
    with replace(network, "layer1", lambda feature: None), pytest.raises(TypeError, match="tensor"):
        network(inputs)


def test_taps_attached_before_compiling_are_compiled_in(network, inputs) -> None:
    network.eval()
    taps = attach(network, ("stages", "stage1.preactivation", "penultimate"))
    with taps:
        network(inputs)
    expected = taps.collect()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for _ in range(3):
        with taps:
            compiled(inputs)
        features = taps.collect()
        assert list(features) == list(expected)
        assert all(torch.equal(features[name], expected[name]) for name in expected)
    compiled(inputs)
    with pytest.raises(RuntimeError, match="did not run"):
        taps.collect()
