"""Graphs of nodes with classes: what is read, how it is split, what is refused."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from kdrun.build import instantiate
from kdrun.data.graph import UNKNOWN, Graph, read_graph
from kdrun.errors import UserError

pytest.importorskip("torch_geometric", reason="the extra graph is not installed")

NODES, WORDS = 520, 12


def write_planetoid(root: Path, **changes) -> Path:
    """Raw files of a graph named Cora: 520 nodes on a ring, 2 classes.

    The last ten nodes are the test nodes, out of order; the first four have labels.
    """
    generator = np.random.default_rng(0)
    features = generator.integers(0, 2, (NODES, WORDS)).astype(np.float32)
    features[:, 0] = 1
    labels = np.eye(2, dtype=np.int32)[np.arange(NODES) % 2]
    test = 510 + np.array([3, 0, 9, 1, 2, 8, 4, 7, 5, 6])
    graph = {i: [(i - 1) % NODES, (i + 1) % NODES] for i in range(NODES)}
    graph[3] = [2, 4, 3, 4]  # a node that is its own neighbour, and an edge that comes twice
    files = {
        "x": scipy.sparse.csr_matrix(features[:4]),
        "y": labels[:4],
        "allx": scipy.sparse.csr_matrix(features[:510]),
        "ally": labels[:510],
        "tx": scipy.sparse.csr_matrix(features[test]),
        "ty": labels[test],
        "graph": graph,
        "test.index": test,
    } | changes
    folder = root / "Planetoid" / "Cora" / "raw"
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / f"ind.cora.{name}"
        if name == "test.index":
            path.write_text("".join(f"{number}\n" for number in content))
        elif content is not None:
            path.write_bytes(pickle.dumps(content, protocol=2))
    return folder


@pytest.fixture
def planetoid(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path))
    return write_planetoid(tmp_path)


def write_npz(root: Path) -> None:
    folder = root / "Amazon" / "Photo" / "raw"
    folder.mkdir(parents=True)
    nodes = 60
    features = scipy.sparse.random(nodes, WORDS, 0.5, format="csr", random_state=0)
    there = (np.ones(nodes), (np.arange(nodes), (np.arange(nodes) + 1) % nodes))
    adjacency = scipy.sparse.csr_matrix(there, (nodes, nodes))
    parts = {
        f"{name}_{part}": getattr(matrix, part)
        for name, matrix in (("attr", features), ("adj", adjacency))
        for part in ("data", "indices", "indptr", "shape")
    }
    np.savez(folder / "amazon_electronics_photo.npz", labels=np.arange(nodes) % 3, **parts)


def prepared(**options) -> Graph:
    data = Graph(**options)
    data.prepare()
    return data


def batch_of(data: Graph, split: str = "train"):
    (batch,) = getattr(data, split)(
        batch_size=NODES, device="cpu", **({"seed": 0} if split == "train" else {})
    )
    return batch


# -- reading ---------------------------------------------------------------------------------------


def test_a_graph_is_read(planetoid: Path) -> None:
    raw = read_graph("Cora")
    edges = set(map(tuple, raw.inputs["edge_index"].T.tolist()))
    assert len(edges) == raw.inputs["edge_index"].shape[1] == 2 * NODES
    assert all((j, i) in edges and i != j for i, j in edges)
    # Test nodes stand where their numbers say, whatever their order in the file.
    assert raw.target.tolist() == [i % 2 for i in range(NODES)]
    masks = {name: mask.nonzero().flatten().tolist() for name, mask in raw.masks.items()}
    assert masks["train"] == [0, 1, 2, 3] and masks["test"] == list(range(510, 520))


def test_features_of_a_node_sum_to_one(planetoid: Path) -> None:
    x = batch_of(prepared()).inputs["x"]
    torch.testing.assert_close(x.sum(1), torch.ones(NODES))
    assert batch_of(prepared(normalise_features=False)).inputs["x"].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": {0: [1], 1: [0, 777]}}, "an edge leads to node 777, but there are 520 nodes"),
        (
            {"allx": scipy.sparse.csr_matrix(np.ones((507, WORDS)))},
            r"cannot be read|features of 517 nodes, but classes of 520",
        ),
        ({"tx": scipy.sparse.csr_matrix(np.ones((10, WORDS + 1)))}, "cannot be read"),
        ({"tx": None, "graph": None}, r"ind\.cora\.tx, ind\.cora\.graph not found in"),
    ],
    ids=["dangling edge", "other length", "other width", "missing"],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, monkeypatch, changes, message) -> None:
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path))
    write_planetoid(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        prepared()
    assert "\n" not in str(caught.value)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_not_run(planetoid: Path, tmp_path: Path) -> None:
    (planetoid / "ind.cora.graph").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(UserError, match=r"ind\.cora\.graph cannot be read: it names \w+\.mkdir"):
        prepared()
    assert not (tmp_path / "boom").exists()


def test_a_damaged_file_is_one_line(planetoid: Path) -> None:
    path = planetoid / "ind.cora.allx"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"ind\.cora\.allx cannot be read"):
        prepared()


def test_a_missing_library_is_one_line(planetoid: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.io", None)
    with pytest.raises(UserError, match=r"pip install 'kdrun\[graph\]'"):
        prepared()


# -- splits and batches ----------------------------------------------------------------------------


def test_each_split_is_the_graph_with_a_mask(planetoid: Path) -> None:
    data = prepared()
    assert (data.train_size, data.test_size, data.num_classes) == (NODES, 10, 2)
    assert data.input_shape == {"x": (WORDS,), "edge_index": (2, 2 * NODES)}
    for split, nodes in (("train", [0, 1, 2, 3]), ("test", list(range(510, 520)))):
        batch = batch_of(data, split)
        assert batch.inputs["x"].shape == (NODES, WORDS) and len(batch) == NODES
        assert batch.mask.nonzero().flatten().tolist() == nodes
        assert batch.target[batch.mask].tolist() == [i % 2 for i in nodes]
        assert (batch.target[~batch.mask] == UNKNOWN).all(), "no label of another split is there"


def test_an_epoch_is_one_batch(planetoid: Path) -> None:
    loader = prepared().train(batch_size=NODES, seed=0, device="cpu")
    assert len(loader) == 1 and len(list(loader)) == 1
    loader.set_epoch(3, start=1)
    assert list(loader) == []
    assert loader.replay(3, 0).augmentation == 3
    double = prepared().train(batch_size=2, seed=1, device="cpu", dtype=torch.float64)
    assert double.replay(0, 0).inputs["x"].dtype == torch.float64


def test_hidden_nodes_are_in_no_training(planetoid: Path) -> None:
    data = prepared(setting="inductive", hidden_fraction=0.4)
    whole = prepared()
    test = batch_of(data, "test")
    hidden = test.index[test.mask]
    assert len(hidden) == data.test_size == 4 and set(hidden.tolist()) < set(range(510, 520))
    assert len(test.index) == NODES
    train = batch_of(data)
    assert len(train) == data.train_size == NODES - 4
    assert not set(train.index.tolist()) & set(hidden.tolist())
    # Edges are those of the whole graph between the nodes that are left.
    ends = train.index[train.inputs["edge_index"]]
    expected = {
        edge
        for edge in map(tuple, batch_of(whole).inputs["edge_index"].T.tolist())
        if not set(edge) & set(hidden.tolist())
    }
    assert set(map(tuple, ends.T.tolist())) == expected
    torch.testing.assert_close(train.inputs["x"], batch_of(whole).inputs["x"][train.index])
    other = prepared(setting="inductive", hidden_fraction=0.4, split_seed=1)
    assert other.fingerprint != data.fingerprint


def test_random_splits(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path))
    write_npz(tmp_path)
    options = {"name": "Photo", "split": "random", "per_class": 5}
    options |= {"validation_nodes": 10, "test_nodes": 20}
    data = prepared(**options)
    masks = {name: batch_of(data, name).mask for name in ("train", "validation", "test")}
    assert [int(mask.sum()) for mask in masks.values()] == [15, 10, 20]
    assert int(torch.stack(list(masks.values())).sum(0).max()) == 1
    train = batch_of(data)
    assert train.target[train.mask].bincount().tolist() == [5, 5, 5]
    assert prepared(**options).fingerprint == data.fingerprint
    assert prepared(**options, split_seed=1).fingerprint != data.fingerprint
    with pytest.raises(UserError, match=r"dataset\.per_class=99: class 0 has 20 samples"):
        prepared(**options | {"per_class": 99})
    with pytest.raises(UserError, match=r"dataset\.test_nodes=40: Photo has 45 nodes besides"):
        prepared(**options | {"test_nodes": 40})
    with pytest.raises(ValueError, match="set split=random"):
        Graph(name="Photo")


@pytest.mark.skipif(
    not Path(os.environ.get("KDRUN_DATA", "/nowhere"), "Planetoid", "Cora").is_dir(),
    reason="KDRUN_DATA holds no Planetoid/Cora",
)
def test_real_cora() -> None:
    data = instantiate({"_target_": "kdrun.data.graph.Graph"})
    data.prepare("holdout")
    assert data.input_shape == {"x": (1433,), "edge_index": (2, 10556)}
    assert data.num_classes == 7
    assert (data.train_size, data.validation_size, data.test_size) == (2708, 500, 1000)
    batch = next(iter(data.train(batch_size=1, seed=0, device="cpu")))
    assert batch.target[batch.mask].bincount().tolist() == [20] * 7
