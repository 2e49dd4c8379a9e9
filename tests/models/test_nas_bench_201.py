from __future__ import annotations

import pytest
import torch

from kdrun.architectures.cost import cost_of
from kdrun.layers.taps import attach
from kdrun.models.nas_bench_201 import EDGES, OPERATIONS, Cell, NasBench201, format_cell, parse_cell

FOUND = (
    "|skip_connect~0|+|nor_conv_3x3~0|nor_conv_1x1~1|"
    "+|nor_conv_1x1~0|nor_conv_3x3~1|nor_conv_3x3~2|"
)


def test_a_cell_and_its_string() -> None:
    operations = parse_cell(FOUND)
    assert operations == [
        *("skip_connect", "nor_conv_3x3", "nor_conv_1x1"),
        *("nor_conv_1x1", "nor_conv_3x3", "nor_conv_3x3"),
    ]
    assert format_cell(operations) == FOUND


@pytest.mark.parametrize("text", ["", "|none~0|", FOUND + "|", FOUND.replace("1x1~1", "1x1~0")])
def test_what_is_no_cell_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a cell is \|op~0\|"):
        parse_cell(text)


def test_the_graph_of_a_cell() -> None:
    """Only skips: node 3 sums 0, 1 and 2, which sum what is before them: 4 times the input."""
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(Cell(["skip_connect"] * 6, 4)(x), 4 * x)
    assert not Cell(["none"] * 6, 4)(x).any()
    direct = ["none", "none", "none", "skip_connect", "none", "none"]
    assert torch.equal(Cell(direct, 4)(x), x)
    chain = ["skip_connect", "none", "skip_connect", "none", "none", "skip_connect"]
    assert torch.equal(Cell(chain, 4)(x), x)
    assert sum(map(len, EDGES)) == 6


def test_sizes_of_the_benchmark() -> None:
    """NAS-Bench-201 gives these for CIFAR-10: all 3x3 convolutions, and nothing at all."""
    sample = torch.empty(1, 3, 32, 32, device="meta")
    largest = cost_of(lambda: NasBench201(num_classes=10, cell=["nor_conv_3x3"] * 6), sample)
    assert largest.parameters == pytest.approx(1.53e6, rel=0.01)
    assert largest.multiply_adds == pytest.approx(220e6, rel=0.02)
    smallest = cost_of(lambda: NasBench201(num_classes=10, cell=["none"] * 6), sample)
    assert smallest.parameters == pytest.approx(0.073e6, rel=0.02)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_trains(operation: str) -> None:
    network = NasBench201(num_classes=5, cell=[operation] * 6, width=4, cells=1)
    with attach(network, ["stages", "penultimate"]) as taps:
        logits = network(torch.randn(2, 3, 8, 8))
    shapes = {name: tuple(value.shape[1:]) for name, value in taps.collect().items()}
    expected = {"stage1": (4, 8, 8), "stage2": (8, 4, 4), "stage3": (16, 2, 2)}
    assert shapes == expected | {"penultimate": (16,)}
    logits.sum().backward()


def test_cells_may_be_given_as_string_or_list() -> None:
    torch.manual_seed(0)
    first = NasBench201(num_classes=5, cell=FOUND, width=4, cells=1)
    second = NasBench201(num_classes=5, cell=parse_cell(FOUND), width=4, cells=1)
    assert list(first.state_dict()) == list(second.state_dict())
    for cell in (["none"] * 5, ["none"] * 5 + ["max_pool"]):
        with pytest.raises(ValueError, match="cell: six of none"):
            NasBench201(num_classes=5, cell=cell)
