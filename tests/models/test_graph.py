from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from kdrun.errors import UserError
from kdrun.inputs import call_network
from kdrun.layers.taps import attach
from kdrun.models import build_model
from kdrun.models.graph import GraphNetwork, MeanConvolution

SHAPES = {"x": (6,), "edge_index": (2, 4)}
NODES = 4
EDGES = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
KINDS = ["gcn", "sage", "gat"]


def network(kind: str, **options) -> GraphNetwork:
    torch.manual_seed(0)
    return GraphNetwork(convolution=kind, num_classes=3, input_shape=SHAPES, **options)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    x = torch.randn(NODES, 6, generator=torch.Generator().manual_seed(0))
    return {"x": x, "edge_index": EDGES}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_classifies_nodes(kind: str, inputs) -> None:
    pytest.importorskip("torch_geometric")
    for layers in (1, 2, 3):
        logits = call_network(network(kind, layers=layers, hidden=8), inputs)
        assert logits.shape == (NODES, 3)
        logits.sum().backward()
    node = {"_target_": "kdrun.models.graph.GraphNetwork", "convolution": kind}
    built = build_model(node, num_classes=3, input_shape=SHAPES)
    assert call_network(built, inputs).shape == (NODES, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_looks_one_edge_further(kind: str, inputs) -> None:
    pytest.importorskip("torch_geometric")
    for layers, reached in ((1, {0, 1}), (2, {0, 1, 2})):
        net = network(kind, layers=layers, hidden=8).eval()
        x = inputs["x"].clone().requires_grad_()
        net(x, EDGES)[0].sum().backward()
        assert set(x.grad.abs().sum(1).nonzero().flatten().tolist()) <= reached
        assert x.grad[max(reached)].abs().sum() > 0
    # A node without neighbours is classified by its own features.
    assert torch.isfinite(net(inputs["x"], EDGES)[3]).all()


def test_gcn_by_hand(inputs) -> None:
    """D^-1/2 (A + I) D^-1/2 X W + b, and a ReLU between two such layers."""
    pytest.importorskip("torch_geometric")
    net = network("gcn", hidden=8).eval()
    adjacency = torch.eye(NODES)
    adjacency[EDGES[0], EDGES[1]] = 1
    scale = adjacency.sum(1).rsqrt()
    adjacency = scale[:, None] * adjacency * scale[None, :]
    x = inputs["x"]
    for number, layer in enumerate(net.layers):
        x = adjacency @ (x @ layer.lin.weight.T) + layer.bias
        x = x.relu() if number == 0 else x
    torch.testing.assert_close(net(**inputs), x)


def test_mean_convolution_by_hand(inputs) -> None:
    layer = MeanConvolution(6, 2)
    x = inputs["x"]
    mean = torch.stack(
        [(2 * x[0] + x[1]) / 3, (2 * x[1] + x[0] + x[2]) / 4, (2 * x[2] + x[1]) / 3, x[3]]
    )
    torch.testing.assert_close(layer(x, EDGES), mean @ layer.linear.weight.T + layer.bias)


def test_attention_has_one_head_in_the_last_layer() -> None:
    pytest.importorskip("torch_geometric")
    net = network("gat", layers=3, hidden=8, heads=2)
    assert [(layer.heads, layer.out_channels) for layer in net.layers] == [(2, 4), (2, 4), (1, 3)]
    with pytest.raises(ValueError, match="heads=3 does not divide hidden=8"):
        network("gat", hidden=8, heads=3)


@pytest.mark.parametrize(("kind", "dropped"), [("gcn", 1), ("sage", 1), ("gat", 2)])
def test_where_features_are_dropped(kind: str, dropped: int, inputs, monkeypatch) -> None:
    pytest.importorskip("torch_geometric")
    seen = []
    monkeypatch.setattr("kdrun.models.graph.F.dropout", lambda x, p, training: seen.append(p) or x)
    network(kind, hidden=8, dropout=0.3, attention_dropout=0.0)(**inputs)
    assert seen.count(0.3) == dropped


@pytest.mark.parametrize("kind", KINDS)
def test_taps(kind: str, inputs) -> None:
    pytest.importorskip("torch_geometric")
    net = network(kind, layers=3, hidden=8).eval()
    with attach(net, ["stages", "penultimate"], sample=inputs) as taps:
        net(**inputs)
    features = taps.collect()
    assert {name: value.shape for name, value in features.items()} == dict.fromkeys(
        ("stage1", "stage2", "penultimate"), (NODES, 8)
    )
    assert (features["stage1"] >= 0).all()


def test_a_data_set_without_a_graph_is_one_line() -> None:
    with pytest.raises(ValueError, match="reads nodes"):
        GraphNetwork(convolution="sage", num_classes=3, input_shape=(3, 8, 8))


def test_a_missing_library_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(UserError, match=r"pip install 'kdrun\[graph\]'"):
        network("gcn")


def test_a_student_without_edges(inputs) -> None:
    node = {"_target_": "kdrun.models.mlp.MLP", "reads": "x", "dropout": 0.5, "hidden": [4]}
    student = build_model(node, num_classes=3, input_shape=SHAPES).eval()
    assert sum(isinstance(module, nn.Dropout) for module in student.modules()) == 1
    logits = call_network(student, inputs)
    # The edges may be others, or withheld altogether.
    assert torch.equal(call_network(student, inputs | {"edge_index": EDGES[:, :1]}), logits)
    assert torch.equal(student(inputs["x"]), logits)
