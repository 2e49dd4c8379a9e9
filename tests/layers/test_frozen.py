from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdrun.forward import run_network
from kdrun.layers.frozen import fold_batch_norm, run_in_bfloat16
from kdrun.layers.taps import attach
from kdrun.models.resnet import ResNet
from kdrun.outputs import Batch
from kdrun.tasks.classification import Classification


def trained_looking(network: nn.Module) -> nn.Module:
    """Batch normalisation that is not the identity it starts as."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.add_(0.3 * torch.randn(values.shape, generator=generator))
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return network.eval()


def small_resnet() -> nn.Module:
    return ResNet(num_classes=10, in_channels=3, blocks=[1, 1], widths=[16, 32], stem_width=16)


class Residual(nn.Module):
    """Uses its convolution's output twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return (y + self.norm(y)).mean((2, 3))


@pytest.mark.parametrize("name", ["ours", "torchvision"])
def test_a_folded_network_is_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    if name == "ours":
        network = small_resnet()
    else:
        from torchvision.models import mobilenet_v2

        network = mobilenet_v2(num_classes=10)
    trained_looking(network)
    images = torch.randn(4, 3, 32, 32)
    folded = fold_batch_norm(network, images[:2])
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [path for path, _ in folded.named_modules()] == [p for p, _ in network.named_modules()]
    with torch.no_grad():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-4)


def test_a_convolution_that_others_read_is_not_folded() -> None:
    with pytest.raises(ValueError, match="Residual uses outputs of convolutions besides"):
        fold_batch_norm(trained_looking(Residual()), torch.randn(2, 3, 8, 8))


def test_half_precision_stays_inside() -> None:
    torch.manual_seed(0)
    network = trained_looking(small_resnet())
    batch = Batch(torch.randn(4, 3, 16, 16), torch.zeros(4).long(), torch.arange(4))
    task, taps = Classification(num_classes=10), attach(network, ("stage2", "penultimate"))
    with torch.no_grad():
        exact = run_network(task, network, batch, taps)
        run_in_bfloat16(network)
        output = run_network(task, network, batch, taps)
    assert output.logits.dtype == torch.float32
    assert {f.dtype for f in output.features.values()} == {torch.float32}
    assert not torch.equal(output.logits, exact.logits)
    scale = exact.logits.std()
    torch.testing.assert_close(output.logits / scale, exact.logits / scale, rtol=0, atol=0.1)
    assert not torch.is_autocast_enabled("cpu")


def test_a_forward_that_fails_leaves_half_precision() -> None:
    network = run_in_bfloat16(nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        network(torch.ones(1, 4))
    assert not torch.is_autocast_enabled("cpu")
    assert network(torch.ones(1, 3)).dtype == torch.float32
