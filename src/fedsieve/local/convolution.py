"""Which algorithm computes a convolution on a CPU: the same function by other operations, where these are faster.

    one channel                    one matrix product over the taps
    3x3, 5x5, 32 channels or more  Winograd's algorithm, see `fedsieve.local.winograd`
    else                           PyTorch's own

The choice depends on the layer alone, never on the machine, so a config repeats bit for bit.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

CHANNELS = 32
"""fewest inputs and outputs of a layer for which Winograd's algorithm pays"""


def accelerate(module: nn.Module) -> None:
    """Have each convolution of a module on the CPU computed by what suits it."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros":
            if layer.in_channels == 1 and isinstance(layer.padding, tuple):
                layer.forward = partial(_plane, layer)  # type: ignore[method-assign]
            elif _suits_winograd(layer):
                layer.forward = partial(_winograd, layer)  # type: ignore[method-assign]


def _suits_winograd(layer: nn.Conv2d) -> bool:
    """Whether Winograd's algorithm computes the layer, and pays."""
    alike = layer.padding[0] == layer.padding[-1] and isinstance(layer.padding, tuple)
    wide = min(layer.in_channels, layer.out_channels) >= CHANNELS
    return alike and wide and layer.stride == (1, 1) and layer.kernel_size in ((3, 3), (5, 5))


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
