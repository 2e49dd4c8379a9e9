"""Initial weights shared by the convolutional families of the CIFAR benchmarks."""

from __future__ import annotations

from torch import nn


def init_convolutions(network: nn.Module) -> None:
    """He initialisation, fan out: weights from N(0, 2 / (kernel area * output channels)).

    Biases of convolutions become zero. Batch normalisation keeps its usual weight 1 and bias 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(classifier: nn.Linear) -> None:
    """Weights from N(0, 0.01^2), zero bias."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
