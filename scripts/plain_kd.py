"""Distillation as it is commonly written: what kdrun's epoch and process are timed against.

    python scripts/plain_kd.py --arrays FILE --teacher NAME --student NAME --save FILE

Per-image PIL transforms in a DataLoader, a plain loop in fp32 with contiguous networks, the loss
and the accuracy read at every step, evaluation and a checkpoint after every epoch. With
``--report`` it also does what surrounds a run: the teacher is evaluated first, the best weights are
kept, and at the end the teacher and the last and the best student are compared on the test images.

The networks and the objective (T = 4, 0.1 CE + 0.9 KD, SGD) are those of the run that it is
compared with. The file (npz) holds ``train_images`` ``(N, 32, 32, 3)`` uint8, ``train_labels``,
``test_images`` and ``test_labels``; a folder holds ``train/<class>/*.png`` and
``test/<class>/*.png``.

The last line printed is JSON: the seconds of each epoch and the accuracy after it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
TEMPERATURE, KD_WEIGHT = 4.0, 0.9


class ArrayImages(Dataset):
    """Images of an array, turned into PIL images one by one, as torchvision's CIFAR does."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: transforms.Compose):
        self.images, self.labels, self.transform = images, labels, transform
        self.classes = sorted(set(labels.tolist()))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self.images[number])
        return self.transform(image), int(self.labels[number])


def read_data(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Training images with random crops and flips, and test images."""
    finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    change = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    random, fixed = transforms.Compose([*change, *finish]), transforms.Compose(finish)
    if options.images:
        train = datasets.ImageFolder(Path(options.images, "train"), random)
        return train, datasets.ImageFolder(Path(options.images, "test"), fixed)
    stored = np.load(options.arrays)
    train = ArrayImages(stored["train_images"], stored["train_labels"], random)
    return train, ArrayImages(stored["test_images"], stored["test_labels"], fixed)


def build(name: str, num_classes: int) -> nn.Module:
    """One of kdrun's networks."""
    import yaml

    from kdrun.catalogue import shipped
    from kdrun.models import build_model

    node = yaml.safe_load((shipped() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    return build_model(node, num_classes=num_classes, input_shape=(3, 32, 32))


def evaluate(network: nn.Module, loader: DataLoader) -> float:
    """Accuracy in percent."""
    network.eval()
    correct = count = 0
    with torch.no_grad():
        for images, labels in loader:
            correct += (network(images).argmax(1) == labels).sum().item()
            count += len(labels)
    return 100.0 * correct / count


def compare(networks: dict[str, nn.Module], teacher: nn.Module, loader: DataLoader) -> None:
    """Print accuracy, cross-entropy and agreement with the teacher of several networks."""
    totals = {name: [0.0, 0.0, 0.0] for name in networks}
    count = 0
    with torch.no_grad():
        for images, labels in loader:
            reference = teacher(images).argmax(1)
            count += len(labels)
            for name, network in networks.items():
                logits = network.eval()(images)
                found = logits.argmax(1)
                totals[name][0] += (found == labels).sum().item()
                totals[name][1] += functional.cross_entropy(logits, labels, reduction="sum").item()
                totals[name][2] += (found == reference).sum().item()
    for name, (correct, loss, agreeing) in totals.items():
        print(
            f"{name}: accuracy {100 * correct / count:.2f}, cross-entropy {loss / count:.4f}, "
            f"agreement {100 * agreeing / count:.2f}"
        )


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays")
    parser.add_argument("--images")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher-weights")
    parser.add_argument("--student", required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--save", required=True, help="checkpoint to write")
    parser.add_argument("--report", action="store_true", help="compare teacher and students")
    options = parser.parse_args()

    train_set, test_set = read_data(options)
    torch.manual_seed(options.seed)
    num_classes = len(train_set.classes)
    teacher = build(options.teacher, num_classes).eval()
    if options.teacher_weights:
        import safetensors.torch

        teacher.load_state_dict(safetensors.torch.load_file(options.teacher_weights))
    student = build(options.student, num_classes)
    train = DataLoader(train_set, options.batch_size, shuffle=True)
    test = DataLoader(test_set, 256)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4
    )
    if options.report:
        print(f"teacher: test {evaluate(teacher, test):.2f}")
    seconds, accuracy = [], []
    best = Path(options.save).with_suffix(".best.pt")
    for epoch in range(options.epochs):
        began = time.perf_counter()
        student.train()
        total_loss = total_correct = 0.0
        for images, labels in train:
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            kd = functional.kl_div(
                functional.log_softmax(logits / TEMPERATURE, 1),
                functional.softmax(teacher_logits / TEMPERATURE, 1),
                reduction="batchmean",
            )
            loss = functional.cross_entropy(logits, labels) * (1 - KD_WEIGHT)
            loss = loss + KD_WEIGHT * TEMPERATURE**2 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
            total_correct += (logits.argmax(1) == labels).float().mean().item()
        accuracy.append(evaluate(student, test))
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"epoch": epoch}, options.save)
        if options.report and accuracy[-1] == max(accuracy):
            torch.save(student.state_dict(), best)
        seconds.append(time.perf_counter() - began)
        print(f"epoch {epoch + 1}: loss {total_loss / len(train):.4f} test {accuracy[-1]:.2f}")
    if options.report:
        kept = build(options.student, num_classes)
        kept.load_state_dict(torch.load(best, weights_only=True))
        compare({"teacher": teacher, "last": student, "best": kept}, teacher, test)
    print(json.dumps({"seconds": seconds, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
