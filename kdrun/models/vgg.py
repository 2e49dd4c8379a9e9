"""VGG networks for small images, with batch normalisation: vgg8, 11, 13, 16, 19.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, in the form of the knowledge-distillation benchmarks: five groups of 3x3 convolutions, global
average pooling and one linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from kdrun.models.initialization import init_classifier, init_convolutions
from kdrun.parameters import PositiveInt

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five groups of convolution (with bias), batch normalisation and ReLU.

    The first three groups are followed by 2x2 max-pooling, which takes 32 pixels to 4 and 8 pixels
    to 1. Images of 64 pixels and more are pooled after the fourth group too.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        convolutions: number of convolutions in each of the five groups.

    Taps: ``stem`` is the first group, ``stage1`` ... ``stage4`` the others, after the ReLU and
    before pooling.

    Raises:
        ValueError: not five groups.
    """

    def __init__(
        self,
        *,
        num_classes: PositiveInt,
        in_channels: PositiveInt = 3,
        convolutions: Sequence[PositiveInt] = (1, 1, 1, 1, 1),
    ) -> None:
        super().__init__()
        if len(convolutions) != len(WIDTHS):
            raise ValueError(f"VGG has five groups of convolutions, not {list(convolutions)}")
        channels = in_channels
        for index, (count, width) in enumerate(zip(convolutions, WIDTHS, strict=True)):
            group = nn.Sequential()
            for _ in range(count):
                group.append(nn.Conv2d(channels, width, 3, padding=1))
                group.append(nn.BatchNorm2d(width))
                group.append(nn.ReLU(inplace=True))
                channels = width
            self.add_module(f"block{index}", group)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        init_convolutions(self)
        init_classifier(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, H, W)``, at least 8x8, to logits ``(B, num_classes)``."""
        is_large = x.shape[-1] >= 64
        x = functional.max_pool2d(self.block0(x), 2)
        x = functional.max_pool2d(self.block1(x), 2)
        x = functional.max_pool2d(self.block2(x), 2)
        x = self.block3(x)
        x = self.block4(functional.max_pool2d(x, 2) if is_large else x)
        return self.classifier(self.pool(x).flatten(1))

    def tap_points(self) -> dict[str, str]:
        """Where the named activations are."""
        points = {}
        for index, name in enumerate(("stem", "stage1", "stage2", "stage3", "stage4")):
            group = f"block{index}"
            last = len(self.get_submodule(group)) - 1
            points[name] = group
            points[f"{name}.preactivation"] = f"input:{group}.{last}"
            points[f"{name}.norm"] = f"{group}.{last - 1}"
        return points | {"penultimate": "input:classifier"}
