"""Which algorithm computes a convolution on a CPU: the same function by other operations, where these are faster.

                                             convolution = avx2      avx512
    one channel                              one matrix product      PyTorch's own
    3x3 from and to so many channels or more Winograd's from 32      from 64
    5x5                                      Winograd's from 32      PyTorch's own
    else                                     PyTorch's own           PyTorch's own

PyTorch's own are written for the processor's widest vectors, so they are harder to beat where these are wide. Which column
holds is a setting that is resolved before round 1 and recorded; from there on the choice depends on the layer alone, so a
recorded config repeats bit for bit. Winograd's algorithm is in `fedsieve.local.winograd`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fedsieve.settings import Local


@dataclass(frozen=True, slots=True)
class Choice:
    """Where other algorithms than PyTorch's pay."""

    channels: int
    """fewest inputs and outputs of a layer for which Winograd's algorithm does"""
    kernels: tuple[tuple[int, int], ...]
    """sizes for which Winograd's algorithm does"""
    plane: bool
    """one channel as a matrix product"""


CHOICES = {"avx2": Choice(32, ((3, 3), (5, 5)), True), "avx512": Choice(64, ((3, 3),), False)}


def resolved(local: Local) -> Local:
    """Return settings that say by which algorithms convolutions are computed, where they left it to this processor."""
    if local.convolution != "fast":
        return local
    return replace(local, convolution="avx512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "avx2")


def accelerate(module: nn.Module, local: Local) -> None:
    """Have each convolution of a module on the CPU computed by what suits it."""
    choice = CHOICES.get(resolved(local).convolution)
    if choice is None:
        return
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros":
            if layer.in_channels == 1 and isinstance(layer.padding, tuple):
                if choice.plane:
                    layer.forward = partial(_plane, layer)  # type: ignore[method-assign]
            elif _suits_winograd(layer, choice):
                layer.forward = partial(_winograd, layer)  # type: ignore[method-assign]


def _suits_winograd(layer: nn.Conv2d, choice: Choice) -> bool:
    """Whether Winograd's algorithm computes the layer, and pays."""
    alike = layer.padding[0] == layer.padding[-1] and isinstance(layer.padding, tuple)
    wide = min(layer.in_channels, layer.out_channels) >= choice.channels
    return alike and wide and layer.stride == (1, 1) and layer.kernel_size in choice.kernels


def _plane(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve (B, 1, H, W) as one matrix product; the result has channels-last strides."""
    if x.dim() < 4:
        return nn.Conv2d.forward(layer, x)
    (high, wide), (up, across) = layer.kernel_size, layer.stride
    rows, columns = (int(side) for side in layer.padding)
    padded = pad(x.squeeze(1), (columns, columns, rows, rows))
    height, width = 1 + (padded.shape[1] - high) // up, 1 + (padded.shape[2] - wide) // across
    begins = product(range(high), range(wide))
    taps = torch.stack([padded[:, i : i + up * height : up, j : j + across * width : across] for i, j in begins])
    outputs = linear(taps.flatten(1).t(), layer.weight.flatten(1), layer.bias)
    return outputs.view(len(x), height, width, -1).permute(0, 3, 1, 2)


def _winograd(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve (B, C, H, W) by Winograd's algorithm, unless autocast asks for another precision."""
    if x.dim() < 4 or torch.is_autocast_enabled("cpu"):
        return nn.Conv2d.forward(layer, x)
    from fedsieve.local.winograd import convolve  # the compiler behind it takes a second to load

    return convolve(x, layer.weight, layer.bias, int(layer.padding[0]))
