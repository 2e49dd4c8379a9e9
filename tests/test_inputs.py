from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kdrun.inputs import call_network, read_only
from kdrun.layers.taps import attach


class Sum(nn.Module):
    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        return image + audio


def test_several_inputs_are_passed_by_keyword() -> None:
    image, audio = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert torch.equal(call_network(Sum(), {"audio": audio, "image": image}), image + audio)


def test_a_network_reads_one_of_several_inputs() -> None:
    inputs = {"image": torch.randn(2, 3), "audio": torch.randn(2, 5)}
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    expected = network(inputs["audio"])
    names = list(network.state_dict())
    reader = copy.deepcopy(read_only(network, "audio"))
    assert torch.equal(call_network(reader, inputs), expected)
    assert torch.equal(call_network(reader, inputs["audio"]), expected)
    assert list(reader.state_dict()) == names
    with attach(reader, ["module:0"], sample=inputs) as taps:
        call_network(reader, inputs)
    assert taps.collect()["module:0"].shape == (2, 4)


def test_a_network_that_reads_one_input_can_be_exported() -> None:
    network = read_only(nn.Linear(5, 2), "audio").eval()
    audio = torch.randn(3, 5)
    program = torch.export.export(network, (audio,)).module()
    assert torch.equal(program(audio), network(audio))
