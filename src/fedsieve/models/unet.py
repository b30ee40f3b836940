"""A small U-Net: a class for every pixel of an image."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from fedsieve.errors import UsageError


class UNet(nn.Module):
    """Convolutions at falling resolutions, and back, each level beside what it was on the way down.

    It can be cut into stages (`fedsieve.models.stages`): the first m of `down` and m - 1 of `up` make a U-Net of m levels.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.down = nn.ModuleList(_pair(i, o) for i, o in pairwise((channels, *widths)))
        self.up = nn.ModuleList(_pair(o + i, o) for o, i in pairwise(widths))
        self.out = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to scores (B, H * W, classes), pixels by row."""
        beside: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(max_pool2d(x, 2) if level else x)
            beside.append(x)
        for level in reversed(range(len(self.up))):
            wide = interpolate(x, size=beside[level].shape[-2:])
            x = self.up[level](torch.cat([beside[level], wide], dim=1))
        scores: Tensor = self.out(x)
        return scores.flatten(2).transpose(1, 2)


def unet(shape: tuple[int, ...], classes: int, hidden: tuple[int, ...] = (16, 32, 64)) -> UNet:
    """Make a U-Net (Ronneberger et al. 2015, arXiv 1505.04597) of a level for each width; targets are (H * W,) an example.

    Deviates: padded convolutions, so that every pixel gets a class; nearest neighbours for transposed convolutions; GroupNorm.
    """
    if len(shape) != 3 or min(shape[1:]) < 2 ** (len(hidden) - 1):
        raise UsageError(
            f"a U-Net of {len(hidden)} levels takes images of shape (channels, height, width) from"
            f" {2 ** (len(hidden) - 1)} x {2 ** (len(hidden) - 1)} on.\n"
            f"One example of the data has shape {shape}: set fewer model.hidden."
        )
    return UNet(shape[0], classes, hidden)


def _pair(inputs: int, channels: int) -> nn.Sequential:
    """Two convolutions with GroupNorm of two groups, or of one where channels are odd, and ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, channels):
        groups = 1 if channels % 2 else 2
        layers += [nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels), nn.ReLU()]
    return nn.Sequential(*layers)
