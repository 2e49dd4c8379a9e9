"""Every data set that ships: its config names each option and can be built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml

from kdrun.build import instantiate
from kdrun.data.images import Images
from kdrun.data.module import DataModule
from kdrun.targets import KEY, signature_of

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "dataset").glob("*.yaml"))


def read(path: Path) -> dict:
    """A config with those that it builds on."""
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    parents = [name for name in node.pop("defaults", []) if name != "_self_"]
    for parent in parents:
        if isinstance(parent, str):
            node = merged(read(path.with_name(f"{parent}.yaml")), node)
    return node


def merged(below: dict, above: dict) -> dict:
    """``below`` with the entries of ``above``, group by group."""
    result = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            result[key] = merged(below[key], above[key])
    return result


def nodes(value):
    if isinstance(value, dict):
        if KEY in value:
            yield value
        for item in value.values():
            yield from nodes(item)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_equals_signature(path):
    for node in nodes(read(path)):
        parameters = signature_of(node[KEY]).parameters
        assert set(node) - {KEY} == set(parameters), node[KEY]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_can_be_built(path):
    node = read(path)
    node["name"] = "some/name" if node.get("name") == "???" else node.get("name")
    if node["name"] is None:
        del node["name"]
    module = instantiate(node)
    assert isinstance(module, DataModule)
    if "views" in node:
        assert module.view_names == ("strong",)


def test_digits_have_a_strong_view():
    (path,) = (path for path in CONFIGS if path.stem == "digits")
    module = instantiate(read(path))
    module.prepare("holdout")
    batch = next(iter(module.train(batch_size=32, seed=0, device="cpu", views=("strong",))))
    assert batch.views["strong"].shape == batch.inputs.shape == (32, 1, 8, 8)
    assert not torch.equal(batch.views["strong"], batch.inputs)


@pytest.mark.skipif(
    not Path(os.environ.get("KDRUN_DATA", "/nowhere"), "uoft-cs", "cifar10").is_dir(),
    reason="KDRUN_DATA holds no uoft-cs/cifar10",
)
def test_real_cifar10(hub_cache):
    (path,) = (path for path in CONFIGS if path.stem == "cifar10")
    module = instantiate(read(path) | {"storage": "stream", "image_size": 32, "workers": 0})
    assert isinstance(module, Images)
    module.prepare("holdout")
    assert (module.train_size, module.validation_size, module.test_size) == (45_000, 5_000, 10_000)
    assert module.class_names[:2] == ["airplane", "automobile"] and module.num_classes == 10
    batch = module.train(batch_size=256, seed=0, device="cpu", augment=False).replay(0, 0)
    assert batch.inputs.shape == (256, 3, 32, 32)
    assert batch.inputs.mean().abs() < 0.3 and (batch.inputs.std() - 1).abs() < 0.3
