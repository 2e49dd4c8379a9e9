"""A plain training loop that drives a method through its contract, on scikit-learn's digits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kdrun.layers.taps import attach
from kdrun.method import Method
from kdrun.outputs import Batch, ModelOutput, Progress


class ConvNet(nn.Module):
    """Stem, three stages (8x8, 4x4, 2x2 on digits), global average pooling, classifier."""

    def __init__(self, *, width: int = 4, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = block(in_channels, width, stride=1)
        self.stage1 = block(width, width, stride=1)
        self.stage2 = block(width, 2 * width, stride=2)
        self.stage3 = block(2 * width, 4 * width, stride=2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(self.stem(inputs))))
        return self.classifier(self.pool(features))

    def tap_points(self) -> dict[str, str]:
        points = {"stem": "stem"}
        for name in ("stage1", "stage2", "stage3"):
            points[name] = name
            points[f"{name}.preactivation"] = f"{name}.1"
            points[f"{name}.norm"] = f"{name}.1"
        return points | {"penultimate": "input:classifier"}


def block(channels: int, channels_out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


def digits(samples: int | None = None) -> Batch:
    """Images ``(N, 1, 8, 8)`` in [-1, 1] with their labels."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images[:samples], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    target = torch.tensor(labels[:samples])
    return Batch(inputs, target, torch.arange(len(target)))


class Network:
    """A network of some role with the taps that a method wants from it."""

    def __init__(self, network: nn.Module, taps: tuple[str, ...], sample: Tensor) -> None:
        self.network = network
        self.taps = attach(network, taps, sample)

    def __call__(self, batch: Batch) -> ModelOutput:
        output = self._run(batch.inputs)
        if batch.unlabelled is not None:
            output.unlabelled = self._run(batch.unlabelled.inputs)
        output.views = {name: self._run(inputs) for name, inputs in batch.views.items()}
        return output

    def _run(self, inputs: Tensor) -> ModelOutput:
        with self.taps:
            output = self.network(inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        return ModelOutput(logits, self.taps.collect())


@dataclass
class Session:
    """A method with its networks, set up as the engine does it."""

    method: Method
    student: Network
    others: dict[str, Network]

    def forward(self, batch: Batch) -> tuple[ModelOutput, dict[str, ModelOutput]]:
        outputs = {}
        for role, network in self.others.items():
            with torch.set_grad_enabled(role in self.method.trainable_roles):
                outputs[role] = network(batch)
        return self.student(batch), outputs

    def terms(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        batch = self.method.augment(batch)
        return self.method.losses(*self.forward(batch), batch, progress)

    def total(self, batch: Batch, progress: Progress) -> Tensor:
        return weighted_sum(self.terms(batch, progress), self.method.weights(progress))

    def parameters(self) -> list[nn.Parameter]:
        trained = [self.others[role].network for role in self.method.trainable_roles]
        modules = [self.student.network, *trained, self.method]
        return [p for module in modules for p in module.parameters() if p.requires_grad]


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    unknown = set(weights) - set(terms)
    assert not unknown, f"weights for terms that do not exist: {unknown}"
    return sum(weights.get(name, 1.0) * term for name, term in terms.items())


def start(
    method: Method,
    student: nn.Module,
    teacher: nn.Module,
    data: Batch,
    make_peer: Callable[[], nn.Module] = ConvNet,
) -> Session:
    """Wrap, tap, set up from a dry forward of two samples, prepare."""
    pupil = copy.deepcopy(teacher)
    teacher.eval().requires_grad_(False)
    others = {
        role: make_peer()
        if source == "student"
        else (pupil if role in method.trainable_roles else teacher)
        for role, source in method.roles().items()
    }
    two = data.rows(slice(2))
    others = dict(method.wrap_teachers(others, two.inputs))
    for role in others.keys() - set(method.trainable_roles):
        others[role].eval().requires_grad_(False)
    student = method.wrap(student, others, two.inputs)
    taps = method.taps()
    session = Session(
        method,
        Network(student, taps.get("student", ()), two.inputs),
        {role: Network(net, taps.get(role, ()), two.inputs) for role, net in others.items()},
    )
    trained = [student, *(others[role] for role in method.trainable_roles)]
    for network in trained:
        network.eval()
    with torch.no_grad():
        method.setup(*session.forward(two))
    frozen = {role: net for role, net in others.items() if role not in method.trainable_roles}
    method.prepare(frozen, [data])
    for network in (*trained, method):
        network.train()
    return session


def train(
    method: Method,
    student: nn.Module,
    teacher: nn.Module,
    data: Batch,
    *,
    epochs: int = 3,
    batch_size: int = 64,
    learning_rate: float = 0.05,
) -> list[dict[str, float]]:
    """Distil with SGD; the mean of every term, and of what was recorded, by epoch."""
    session = start(method, student, teacher, data)
    optimizer = torch.optim.SGD(session.parameters(), learning_rate, momentum=0.9)
    orders = torch.Generator().manual_seed(0)
    per_epoch = len(data) // batch_size
    history = []
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=orders)
        sums: dict[str, float] = {}
        for i in range(per_epoch):
            rows = order[i * batch_size : (i + 1) * batch_size]
            progress = Progress(epoch, epochs, epoch * per_epoch + i, epochs * per_epoch)
            views = {name: view[rows] for name, view in data.views.items()}
            batch = Batch(data.inputs[rows], data.target[rows], data.index[rows], None, views)
            terms = session.terms(batch, progress)
            loss = weighted_sum(terms, method.weights(progress))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step(progress)
            for name, value in (terms | method.take_recorded()).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / per_epoch
        history.append(sums)
    return history


@torch.no_grad()
def agreement(student: nn.Module, teacher: nn.Module, inputs: Tensor) -> float:
    """Share of inputs on which both predict the same class, in evaluation mode."""
    predictions = [network.eval()(inputs).argmax(dim=1) for network in (student, teacher)]
    return float((predictions[0] == predictions[1]).float().mean())
