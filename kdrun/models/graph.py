"""Networks on the nodes of a graph: GCN, GraphSAGE and GAT, of torch_geometric's convolutions.

Kipf and Welling, ICLR 2017; Hamilton et al., NeurIPS 2017; Velickovic et al., ICLR 2018. The
arrangement is that of the graph-to-MLP distillation literature: a ReLU and dropout after each
hidden layer, no normalisation layers, no residual connections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdrun.errors import UserError
from kdrun.parameters import PositiveInt, ProperFraction


class GraphNetwork(nn.Module):
    """A stack of graph convolutions that classifies every node.

    ``gcn`` and ``gat`` are torch_geometric's, which add one edge of each node to itself. ``sage``
    is the "gcn" aggregator of GraphSAGE, which torch_geometric does not have (``MeanConvolution``).
    ``gat`` concatenates its heads in hidden layers and has a single one in the last; its dropout
    is on what enters each convolution, the features of the nodes included, as in DGL.

    Args:
        convolution: the kind of all layers.
        num_classes: outputs for each node.
        input_shape: shapes of the inputs by name, of which ``x`` is the features of a node.
        layers: number of convolutions.
        hidden: width between them, of all heads together.
        dropout: after each hidden layer.
        heads: attention heads of hidden layers of ``gat``; ``hidden`` is divided among them.
        attention_dropout: of the attention of ``gat``.

    Taps: ``stage1`` ... are the hidden layers after their ReLU, ``(N, hidden)``.

    Raises:
        UserError: torch_geometric is not installed.
        ValueError: the data set has no features ``x`` of nodes, or ``heads`` does not divide
            ``hidden``.
    """

    def __init__(
        self,
        *,
        convolution: Literal["gcn", "sage", "gat"],
        num_classes: PositiveInt,
        input_shape: Mapping[str, Sequence[int]] | None = None,
        layers: PositiveInt = 2,
        hidden: PositiveInt = 64,
        dropout: ProperFraction = 0.5,
        heads: PositiveInt = 4,
        attention_dropout: ProperFraction = 0.3,
    ) -> None:
        super().__init__()
        if not isinstance(input_shape, Mapping) or "x" not in input_shape:
            raise ValueError("a graph network reads nodes (x) and edges (edge_index) of a graph")
        self.convolution, self.dropout = convolution, dropout
        (width,) = input_shape["x"]
        self.layers, self.activations = nn.ModuleList(), nn.ModuleList()
        for number in range(layers):
            last = number == layers - 1
            out = num_classes if last else hidden
            if convolution == "gat":
                layer = _attention(width, out, 1 if last else heads, attention_dropout)
            elif convolution == "sage":
                layer = MeanConvolution(width, out)
            else:
                layer = _torch_geometric().GCNConv(width, out)
            self.layers.append(layer)
            if not last:
                self.activations.append(nn.ReLU())
            width = out

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Features ``(N, D)`` and edges ``(2, E)``, from row 0 to row 1, to logits ``(N, C)``."""
        for number, layer in enumerate(self.layers):
            if self.convolution == "gat" or number:
                x = F.dropout(x, self.dropout, self.training)
            x = layer(x, edge_index)
            if number < len(self.activations):
                x = self.activations[number](x)
        return x

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {}
        for number in range(len(self.activations)):
            points[f"stage{number + 1}"] = f"activations.{number}"
            points[f"stage{number + 1}.preactivation"] = f"layers.{number}"
        return points | {"penultimate": f"input:layers.{len(self.layers) - 1}"}


class MeanConvolution(nn.Module):
    """GraphSAGE's "gcn" aggregator: the mean over a node and its neighbours, then a linear map.

    In the graphs of the released code every node is its own neighbour too, so the node itself
    counts twice: ``(sum of neighbours + 2 x) / (neighbours + 2)``. Edges of a node to itself are
    not looked for: the graph must have none.

    Args:
        width: of the features that enter.
        out: of those that leave.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias=False)
        self.bias = nn.Parameter(torch.zeros(out))
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """``(N, width)`` and edges ``(2, E)`` to ``(N, out)``."""
        # Mapped first, which is the same and moves fewer numbers along the edges.
        x = self.linear(x)
        source, target = edge_index
        total = (2 * x).index_add(0, target, x[source])
        count = x.new_full((len(x),), 2).index_add(0, target, x.new_ones(len(target)))
        return total / count.unsqueeze(1) + self.bias


def _attention(width: int, out: int, heads: int, dropout: float) -> nn.Module:
    if out % heads:
        raise ValueError(f"heads={heads} does not divide hidden={out}")
    return _torch_geometric().GATConv(width, out // heads, heads=heads, dropout=dropout)


def _torch_geometric() -> Any:
    try:
        import torch_geometric.nn
    except ImportError as error:
        raise UserError(
            f"graph networks need torch_geometric ({error}): pip install 'kdrun[graph]'"
        ) from error
    return torch_geometric.nn
