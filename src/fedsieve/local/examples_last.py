"""Pooling, normalisation and dropout of images that stand with the examples last in memory, as the sparse kernels hand them on.

PyTorch's own layers compute the same, but bring the elements into another order first. Element-wise functions, sums and means
need nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedsieve.local.lines import Floats, compiled, largest, routed

Bytes = NDArray[np.uint8]


def is_last(x: Tensor) -> bool:
    """Whether images (B, C, H, W) have the examples last in memory."""
    return x.dim() == 4 and len(x) > 1 and x.stride(0) == 1 and x.permute(1, 2, 3, 0).is_contiguous()


def keep_last(module: nn.Module) -> None:
    """Have the layers of a module keep the order of images that come with the examples last; others they treat as before."""
    for layer in module.modules():
        if type(layer) in _LAYERS and not (isinstance(layer, nn.MaxPool2d) and window_of(layer) is None):
            layer.forward = partial(_LAYERS[type(layer)], layer)


def window_of(layer: nn.MaxPool2d) -> tuple[int, int] | None:
    """Window of a pooling whose windows stand side by side and within the images; None for any other."""
    size, stride, padding, dilation = (
        _pair(value) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    plain = size == stride and padding == (0, 0) and dilation == (1, 1)
    return size if plain and not layer.ceil_mode and not layer.return_indices and size[0] * size[1] < 255 else None


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@compiled
def _max_pool(x: Floats, window: tuple[int, int], at: NDArray[np.int64], y: Floats, taps: Bytes) -> None:
    """Largest of each window of (C, H, W, B), and which tap of the window it is."""
    channels, height, width, examples = y.shape
    source, into, numbers = x.reshape(x.size), y.reshape(y.size), taps.reshape(taps.size)
    for c in range(channels):
        for h in range(height):
            to = (c * height + h) * width * examples
            base = (c * x.shape[1] + h * window[0]) * x.shape[2] * examples
            step = window[1] * examples
            largest(into, to, examples, numbers, to, examples, source, base, step, at, width, examples, False)


@compiled
def _max_pool_back(y: Floats, taps: Bytes, window: tuple[int, int], at: NDArray[np.int64], x: Floats) -> None:
    """Hand the gradient of each window to the input that it came from."""
    channels, height, width, examples = y.shape
    source, into, numbers = y.reshape(y.size), x.reshape(x.size), taps.reshape(taps.size)
    for c in range(channels):
        for h in range(height):
            begin = (c * height + h) * width * examples
            base = (c * x.shape[1] + h * window[0]) * x.shape[2] * examples
            step = window[1] * examples
            routed(source, begin, examples, numbers, begin, examples, into, base, step, at, width, examples)


class MaxPool(torch.autograd.Function):
    """Max pooling of (B, C, H, W) with the examples last, by windows side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[int, int]) -> Tensor:
        """Pool."""
        images = x.detach().permute(1, 2, 3, 0)
        channels, height, width, examples = images.shape
        shape = (channels, height // window[0], width // window[1], examples)
        y, ctx.taps = torch.empty(shape), np.empty(shape, np.uint8)
        ctx.at = ((np.arange(window[0])[:, None] * width + np.arange(window[1])) * examples).ravel()
        _max_pool(images.numpy(), window, ctx.at, y.numpy(), ctx.taps)
        ctx.shape, ctx.window = images.shape, window
        return y.permute(3, 0, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradient of x."""
        covers = all(side % k == 0 for side, k in zip(ctx.shape[1:3], ctx.window, strict=True))
        x = (torch.empty if covers else torch.zeros)(ctx.shape)
        y = gradient.permute(1, 2, 3, 0).contiguous()
        _max_pool_back(y.numpy(), ctx.taps, ctx.window, ctx.at, x.numpy())
        return x.permute(3, 0, 1, 2), None


class GroupNorm(torch.autograd.Function):
    """Normalise each example over groups of channels (Wu and He 2018, arXiv 1803.08494), examples last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
        """Normalise (B, C, H, W)."""
        images = x.detach().permute(1, 2, 3, 0)
        grouped = images.reshape(groups, -1, images.shape[3])
        centred = grouped - grouped.mean(1, keepdim=True)
        scale = centred.square().mean(1, keepdim=True).add_(eps).rsqrt_()
        normal = centred.mul_(scale).view(images.shape)
        ctx.save_for_backward(normal, scale, weight)
        y = normal if weight is None or bias is None else torch.addcmul(_spread(bias), normal, _spread(weight))
        return y.permute(3, 0, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        normal, scale, weight = ctx.saved_tensors
        y = gradient.permute(1, 2, 3, 0).contiguous()
        to_bias = y.flatten(1).sum(1) if weight is not None else None
        to_weight = (y * normal).flatten(1).sum(1) if weight is not None else None
        grouped = (y if weight is None else y * _spread(weight)).view(len(scale), -1, y.shape[3])
        flat = normal.view(grouped.shape)
        along = (grouped * flat).mean(1, keepdim=True)
        x = (grouped - grouped.mean(1, keepdim=True)).addcmul_(flat, along, value=-1).mul_(scale)
        return x.view(y.shape).permute(3, 0, 1, 2), to_weight, to_bias, None, None


def _spread(channels: Tensor) -> Tensor:
    return channels.detach()[:, None, None, None]


def _pool(layer: nn.MaxPool2d, x: Tensor) -> Tensor:
    if not is_last(x):
        return nn.MaxPool2d.forward(layer, x)  # type: ignore[no-any-return]
    return MaxPool.apply(x, window_of(layer))  # type: ignore[no-any-return, no-untyped-call]


def _batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Normalise by channel, over one long row of all that a channel has, which is how it stands in memory."""
    if not is_last(x):
        return nn.BatchNorm2d.forward(layer, x)
    images: Tensor = x.permute(1, 2, 3, 0)
    rows: Tensor = nn.BatchNorm2d.forward(layer, images.flatten(1)[None, :, :, None])
    return rows.view(images.shape).permute(3, 0, 1, 2)


def _group_norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    if not is_last(x):
        return nn.GroupNorm.forward(layer, x)
    return GroupNorm.apply(x, layer.weight, layer.bias, layer.num_groups, layer.eps)  # type: ignore[no-any-return, no-untyped-call]


def _dropout(layer: nn.Dropout, x: Tensor) -> Tensor:
    """Drop the same elements as where the examples come first: torch draws in the order of memory."""
    if not layer.training or not layer.p or x.is_contiguous():
        return nn.Dropout.forward(layer, x)
    order = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    ones = torch.ones_like(x, memory_format=order, requires_grad=False)
    return x * nn.Dropout.forward(layer, ones)


_LAYERS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.MaxPool2d: _pool,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.Dropout: _dropout,
}
