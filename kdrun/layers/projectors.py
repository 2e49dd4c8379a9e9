"""Small trainable networks that carry student features into the teacher's space."""

from __future__ import annotations

import torch
from torch import nn


def hint_regressor(student: torch.Size, teacher: torch.Size) -> nn.Sequential:
    """The convolutional regressor of FitNets, with batch norm and ReLU, for two feature maps.

    Half the size is reached by a 3x3 convolution of stride 2, double the size by a 4x4 transposed
    convolution of stride 2, any other not larger size (equal included) by one unpadded convolution
    whose kernel makes up the difference.

    Args:
        student: shape ``(B, C, H, W)`` of the student's map.
        teacher: shape ``(B, C', H', W')`` of the teacher's map.

    Raises:
        ValueError: not maps, or a teacher map that is larger but not of double size.
    """
    if len(student) != 4 or len(teacher) != 4:
        raise ValueError(
            f"the hint must be a map (B, C, H, W); student gives {tuple(student)}, "
            f"teacher {tuple(teacher)}"
        )
    channels, *size = student[1:]
    channels_out, *size_out = teacher[1:]
    if size == [2 * length for length in size_out]:
        convolution = nn.Conv2d(channels, channels_out, kernel_size=3, stride=2, padding=1)
    elif [2 * length for length in size] == size_out:
        convolution = nn.ConvTranspose2d(channels, channels_out, kernel_size=4, stride=2, padding=1)
    elif size[0] >= size_out[0] and size[1] >= size_out[1]:
        kernel = (1 + size[0] - size_out[0], 1 + size[1] - size_out[1])
        convolution = nn.Conv2d(channels, channels_out, kernel_size=kernel)
    else:
        raise ValueError(
            f"no regressor from a student map of {size[0]}x{size[1]} to a teacher map of "
            f"{size_out[0]}x{size_out[1]}: larger, but not twice the size; choose another stage"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())
