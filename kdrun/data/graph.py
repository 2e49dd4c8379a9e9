"""Node classification on one graph: Cora and its kin, from torch_geometric's raw files."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdrun.data.batches import Preprocessing, Shape
from kdrun.data.loader import LoaderOptions
from kdrun.data.module import DataModule, EvaluationProtocol
from kdrun.data.seeding import stream
from kdrun.data.sources import data_folder
from kdrun.data.splits import per_class
from kdrun.errors import UserError
from kdrun.outputs import Batch
from kdrun.parameters import NonNegativeInt, PositiveInt, ProperFraction

UNKNOWN = -100
"""The target of nodes that a split does not count: no class, so that none of their labels leaks."""

PLANETOID = ("Cora", "Citeseer", "Pubmed")
FILES = {
    **{
        name: (
            f"Planetoid/{name}/raw",
            tuple(
                f"ind.{name.lower()}.{part}"
                for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
            ),
        )
        for name in PLANETOID
    },
    "Photo": ("Amazon/Photo/raw", ("amazon_electronics_photo.npz",)),
    "CS": ("Coauthor/CS/raw", ("ms_academic_cs.npz",)),
    "Physics": ("Coauthor/Physics/raw", ("ms_academic_phy.npz",)),
}
"""Folder and raw files of each graph, as torch_geometric names them."""

SPLITTING, HIDING = 0, 1
"""What a random stream is for: the second word of its name, after the split's seed."""


@dataclass(slots=True)
class GraphPart:
    """One split: a graph and the nodes of it that count.

    Attributes:
        inputs: ``x (N, D)`` features and ``edge_index (2, E)``, both directions of each edge.
        target: ``(N,)`` int64 class ids.
        index: ``(N,)`` int64, the number of each node in the whole graph.
        mask: ``(N,)`` bool, the nodes that count.
    """

    inputs: dict[str, Tensor]
    target: Tensor
    index: Tensor
    mask: Tensor
    _copies: dict[tuple[torch.device, torch.dtype], Batch] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.mask.sum())

    @property
    def content(self) -> str:
        """Hash of graph and mask."""
        digest = hashlib.sha256(self.mask.numpy().tobytes())
        for name, values in self.inputs.items():
            digest.update(f"{name}{values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.contiguous().numpy())
        return digest.hexdigest()

    @property
    def shape(self) -> Shape:
        """The features of one node, and all edges."""
        edges = self.inputs["edge_index"]
        return {"x": (self.inputs["x"].shape[1],), "edge_index": tuple(edges.shape)}

    def take(self, rows: Tensor) -> GraphPart:
        """The same graph, in which only the given nodes count, of those that did."""
        chosen = torch.zeros_like(self.mask)
        chosen[rows] = True
        return GraphPart(self.inputs, self.target, self.index, self.mask & chosen)

    def serve(self, options: LoaderOptions, preprocessing: Preprocessing) -> GraphLoader:
        """The graph as the only batch of every epoch."""
        place = torch.device(options.device), options.dtype
        if place not in self._copies:
            target = self.target.where(self.mask, UNKNOWN)
            inputs = {
                name: values.to(*place) if values.is_floating_point() else values.to(place[0])
                for name, values in self.inputs.items()
            }
            self._copies[place] = Batch(
                inputs, target.to(place[0]), self.index.to(place[0]), self.mask.to(place[0])
            )
        return GraphLoader(self._copies[place], options)


class GraphLoader:
    """One batch an epoch, the whole graph; see ``kdrun.data.loader.Loader``.

    Args:
        batch: on the device.
        options: of which the batch size and the order of samples have no meaning here.
    """

    def __init__(self, batch: Batch, options: LoaderOptions) -> None:
        self.batch, self.options = batch, options
        self._epoch, self._start = 0, 0

    def __len__(self) -> int:
        return 1

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and how many of its first batches to leave out."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        for position in range(self._start, 1):
            yield self.replay(self._epoch, position)

    def replay(self, epoch: int, position: int) -> Batch:
        """The graph; ``position`` is 0."""
        number = self.options.augmentation(epoch)[1]
        whole = self.batch
        return Batch(dict(whole.inputs), whole.target, whole.index, whole.mask, {}, number)


class Graph(DataModule):
    """One attributed graph with classes on its nodes, in every batch as a whole.

    Edges are made undirected, and edges of a node to itself are left out. Every batch has the mask
    of the nodes that count in its split; other nodes' targets are ``UNKNOWN``. In the transductive
    setting training sees the features and edges of all nodes. In the inductive setting some test
    nodes and their edges are not in its graph, and the test is on these nodes in the whole graph.

    ``train_size`` is the number of nodes of the training graph, labelled or not: distillation needs
    no labels.

    Args:
        name: ``Cora``, ``Citeseer``, ``Pubmed`` (Planetoid), ``Photo`` (Amazon), ``CS`` or
            ``Physics`` (Coauthor); the raw files lie below ``KDRUN_DATA`` or the current folder.
        split: ``public`` has Planetoid's 20 labels a class, 500 validation and 1,000 test nodes.
        split_seed: of random splits and of the hidden nodes.
        per_class: labelled nodes of each class in a random split.
        validation_nodes: of a random split.
        test_nodes: of a random split.
        setting: whether training's graph holds all nodes.
        hidden_fraction: share of the test nodes that the inductive setting hides.
        normalise_features: divide each node's features by their sum.
    """

    single_batch = True

    def __init__(
        self,
        *,
        name: Literal["Cora", "Citeseer", "Pubmed", "Photo", "CS", "Physics"] = "Cora",
        split: Literal["public", "random"] = "public",
        split_seed: NonNegativeInt = 0,
        per_class: PositiveInt = 20,
        validation_nodes: PositiveInt = 500,
        test_nodes: PositiveInt = 1000,
        setting: Literal["transductive", "inductive"] = "transductive",
        hidden_fraction: ProperFraction = 0.2,
        normalise_features: bool = True,
    ) -> None:
        super().__init__(val_fraction=0.0, preprocessing=Preprocessing())
        if split == "public" and name not in PLANETOID:
            raise ValueError(f"split=public: {name} has no split of its own; set split=random")
        self.name, self.split, self.split_seed = name, split, split_seed
        self.per_class = per_class
        self.validation_nodes, self.test_nodes = validation_nodes, test_nodes
        self.setting, self.hidden_fraction = setting, hidden_fraction
        self.normalise_features = normalise_features

    def load(self) -> dict[str, GraphPart]:
        """The splits, all of the same graph unless some nodes are hidden."""
        graph = read_graph(self.name)
        self.class_names = [str(number) for number in range(int(graph.target.max()) + 1)]
        if self.normalise_features:
            x = graph.inputs["x"]
            graph.inputs["x"] = x / x.sum(dim=1, keepdim=True).clamp(min=1e-12)
        masks = graph.masks if self.split == "public" else self._random_masks(graph.target)
        if self.setting == "inductive":
            test = masks["test"].nonzero().flatten()
            order = torch.randperm(len(test), generator=stream(self.split_seed, HIDING))
            hidden = torch.zeros_like(masks["test"])
            hidden[test[order[: round(self.hidden_fraction * len(test))]]] = True
            masks["test"] = hidden
        parts = {name: graph.part(mask) for name, mask in masks.items()}
        if self.setting == "inductive":
            parts |= {name: induced(parts[name], ~hidden) for name in ("train", "validation")}
        return parts

    def select(self, train: GraphPart) -> Tensor:
        """All nodes of the training graph."""
        return torch.arange(len(train.target))

    def prepare(self, protocol: EvaluationProtocol = "holdout") -> None:
        """Load the graph and make the splits."""
        super().prepare(protocol)
        self.train_size = len(self._parts["train"].target)

    def evaluation_batch_size(self, training: int) -> int:
        """All nodes at once."""
        return training

    def _random_masks(self, target: Tensor) -> dict[str, Tensor]:
        """Some labels of each class, then validation and test nodes of the rest."""
        try:
            labelled = per_class(target, self.per_class, seed=self.split_seed)
        except ValueError as error:
            raise UserError(f"dataset.per_class={self.per_class}: {error}") from error
        train = torch.zeros(len(target), dtype=torch.bool)
        train[labelled] = True
        rest = (~train).nonzero().flatten()
        wanted = self.validation_nodes + self.test_nodes
        if wanted > len(rest):
            raise UserError(
                f"dataset.validation_nodes={self.validation_nodes} and "
                f"dataset.test_nodes={self.test_nodes}: {self.name} has {len(rest)} nodes besides "
                "the labelled ones; lower them"
            )
        rest = rest[torch.randperm(len(rest), generator=stream(self.split_seed, SPLITTING))]
        masks = {"train": train}
        ends = {"validation": (0, self.validation_nodes), "test": (self.validation_nodes, wanted)}
        for name, (first, last) in ends.items():
            masks[name] = torch.zeros_like(train)
            masks[name][rest[first:last]] = True
        return masks


def induced(part: GraphPart, kept: Tensor) -> GraphPart:
    """The subgraph of the kept nodes, ``(N,)`` bool; nodes keep their order and their ``index``."""
    edges = part.inputs["edge_index"]
    edges = edges[:, kept[edges[0]] & kept[edges[1]]]
    inputs = {"x": part.inputs["x"][kept], "edge_index": (kept.cumsum(0) - 1)[edges]}
    return GraphPart(inputs, part.target[kept], part.index[kept], part.mask[kept])


# -- raw files -------------------------------------------------------------------------------------


@dataclass(slots=True)
class RawGraph:
    """A graph as read: inputs, classes, and the masks of its own splits where it has some."""

    inputs: dict[str, Tensor]
    target: Tensor
    masks: dict[str, Tensor]

    def part(self, mask: Tensor) -> GraphPart:
        """The split of the nodes in ``mask``."""
        return GraphPart(self.inputs, self.target, torch.arange(len(self.target)), mask)


def read_graph(name: str) -> RawGraph:
    """Read a graph of ``FILES`` through torch_geometric.

    Raises:
        UserError: torch_geometric or a file is missing, a file cannot be read, or its parts do not
            fit together.
    """
    place, files = FILES[name]
    folder = data_folder(place) or Path(place)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"dataset.name={name}: {', '.join(missing)} not found in {folder.resolve()}; put "
            "torch_geometric's raw files there, or set KDRUN_DATA to the folder above"
        )
    try:
        with warnings.catch_warnings():
            # What it says of its own use of PyTorch is not the user's concern.
            warnings.simplefilter("ignore", FutureWarning)
            from torch_geometric.io import read_npz, read_planetoid_data
            from torch_geometric.utils import remove_self_loops, to_undirected
    except ImportError as error:
        raise UserError(
            f"graphs need torch_geometric ({error}): pip install 'kdrun[graph]'"
        ) from error
    try:
        if name in PLANETOID:
            for file in files[:-1]:
                _refuse_code(folder / file)
            data = read_planetoid_data(str(folder), name)
        else:
            data = read_npz(str(folder / files[0]), to_undirected=False)
    except (ValueError, IndexError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the raw files of {name} in {folder} cannot be read: {reason}") from error
    nodes = len(data.y)
    if len(data.x) != nodes:
        raise UserError(
            f"{name} in {folder}: features of {len(data.x)} nodes, but classes of {nodes}"
        )
    dangling = data.edge_index[(data.edge_index < 0) | (data.edge_index >= nodes)]
    if len(dangling):
        raise UserError(
            f"{name} in {folder}: an edge leads to node {int(dangling[0])}, but there are {nodes} "
            "nodes, numbered from 0"
        )
    edges = to_undirected(remove_self_loops(data.edge_index)[0], num_nodes=nodes)
    masks = {}
    if name in PLANETOID:
        masks = {"train": data.train_mask, "validation": data.val_mask, "test": data.test_mask}
    return RawGraph({"x": data.x, "edge_index": edges.contiguous()}, data.y, masks)


ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("scipy.sparse", "csr_matrix"),
    ("collections", "defaultdict"),
    ("builtins", "list"),
    ("_codecs", "encode"),
}
"""What Planetoid's pickles are made of, by module and name."""

RENAMED = {
    "__builtin__": "builtins",
    "scipy.sparse.csr": "scipy.sparse",
    "scipy.sparse._csr": "scipy.sparse",
}
"""Where older files look for the same things."""


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = RENAMED.get(module, module)
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return super().find_class(module, name)


def _refuse_code(path: Path) -> None:
    """Check that a pickle holds arrays, lists and numbers only, before a library opens it.

    Raises:
        UserError: it is damaged or would run code.
    """
    try:
        with path.open("rb") as file:
            _Arrays(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
