"""Convolution of several channels by Winograd's algorithm, forward and backward, on one CPU thread.

With r taps in a row, tiles of m x m outputs are made from tiles of 6 x 6 inputs, m = 7 - r: as products of polynomials that are
known by their values at six points, 0, 1, -1, 2, -2 and infinity. So a convolution is one matrix product, inputs x outputs, for
each of 36 points, between maps from tiles to points and back:

    y = At [(G w Gt) * (Bt x B)] A        * a matrix product over the channels at each point

r = 3 takes 4 times fewer multiplications than the sum over the taps, r = 5 takes 2.8 times fewer. Rounding differs from that of
the sum by about 1e-5 of the largest output. The backward pass is the transpose of each map, in the reverse order.

Sources: Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016 (arXiv 1509.09308), section 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsieve.local.lines import Floats, compiled

SIDE = 6
"""of the tiles of inputs, and number of points in a row"""
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)
"""all but infinity"""
BLOCK = 2**19
"""elements at the 36 points that are worked on at a time, so that they stay in the processor's cache"""


def _vandermonde(columns: int) -> NDArray[np.float64]:
    """Powers of the points, shape (6, columns); infinity has the highest power only."""
    powers = np.vander((*POINTS, 0.0), columns, increasing=True)
    powers[-1] = np.eye(columns)[-1]
    return powers


def _matrices(taps: int) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """Return Bt (6, 6), At (m, 6) and G (6, taps).

    Bt interpolates: row i has the coefficients of the product of (x - p) over all points p but the i-th. G divides by the value
    of that product at the i-th.
    """
    others = [[p for p in POINTS if p != point] for point in POINTS]
    rows = [np.polynomial.polynomial.polyfromroots(roots) for roots in others]
    scale = [np.polynomial.polynomial.polyval(point, row) for point, row in zip(POINTS, rows, strict=True)]
    inputs = np.vstack([*(np.append(row, 0.0) for row in rows), np.polynomial.polynomial.polyfromroots(POINTS)])
    weights = _vandermonde(taps) / np.array([*scale, 1.0])[:, None]
    return inputs.astype(np.float32), _vandermonde(SIDE + 1 - taps).T.astype(np.float32), weights


@compiled
def _combine(
    out: Floats, begin: int, n: int, add: bool, weights: Floats, source: Floats, base: int, at: NDArray[np.int64]
) -> None:
    """out[begin + c] = (or +=) sum over q < 6 of weights[q] * source[base + at[q] + c], for c < n."""
    y = out[begin : begin + n]
    w0, w1, w2, w3, w4, w5 = weights[0], weights[1], weights[2], weights[3], weights[4], weights[5]
    a0, a1, a2 = source[base + at[0] :][:n], source[base + at[1] :][:n], source[base + at[2] :][:n]
    a3, a4, a5 = source[base + at[3] :][:n], source[base + at[4] :][:n], source[base + at[5] :][:n]
    if add:
        for c in range(n):
            y[c] += w0 * a0[c] + w1 * a1[c] + w2 * a2[c] + w3 * a3[c] + w4 * a4[c] + w5 * a5[c]
    else:
        for c in range(n):
            y[c] = w0 * a0[c] + w1 * a1[c] + w2 * a2[c] + w3 * a3[c] + w4 * a4[c] + w5 * a5[c]


@compiled
def _gather(images: Floats, matrix: Floats, side: int, step: int, padding: int, points: Floats) -> None:
    """Map tiles to points: points = matrix tile matrix^T.

    Args:
        images: shape (N, H, W, C); zero outside.
        matrix: shape (6, 6), of which the first `side` columns count and the others are zero.
        side: of a tile, 1 to 6.
        step: from tile to tile; the first one begins at -padding.
        padding: rows and columns before the image.
        points: where the result goes, shape (36, N, down, across, C).
    """
    count, height, width, channels = images.shape
    down, across = points.shape[2], points.shape[3]
    # Columns are sorted by their rest modulo the step, so that what a point needs of all tiles of a row is one stretch.
    phase = across + (side - 1) // step
    line, n = step * phase * channels, across * channels
    rows, columns = np.empty(6, np.int64), np.empty(6, np.int64)
    for q in range(6):
        p = min(q, side - 1)
        rows[q], columns[q] = p * line, (p % step * phase + p // step) * channels
    high = (down - 1) * step + side
    padded = np.zeros(high * line, np.float32)
    half = np.empty(6 * line, np.float32)
    flat = points.reshape(points.size)
    for image in range(count):
        for y in range(min(height, high - padding)):
            for x in range(padding, min(width + padding, step * phase)):
                begin = (y + padding) * line + (x % step * phase + x // step) * channels
                padded[begin : begin + channels] = images[image, y, x - padding]
        for i in range(down):
            for k in range(6):
                _combine(half, k * line, line, False, matrix[k], padded, i * step * line, rows)
            for k in range(6):
                for q in range(6):
                    begin = ((6 * k + q) * count * down + image * down + i) * n
                    _combine(flat, begin, n, False, matrix[q], half, k * line, columns)


@compiled
def _spread(points: Floats, matrix: Floats, side: int, step: int, padding: int, images: Floats) -> None:
    """Map points to tiles, matrix point matrix^T, and add these up where they overlap: the transpose of `_gather`.

    Args:
        points: shape (36, N, down, across, C).
        matrix: shape (side, 6).
        side: of a tile, 1 to 6.
        step: from tile to tile; the first one begins at -padding.
        padding: rows and columns before the image.
        images: where the result goes, shape (N, H, W, C).
    """
    count, height, width, channels = images.shape
    down, across = points.shape[2], points.shape[3]
    phase = across + (side - 1) // step
    line, n = step * phase * channels, across * channels
    at, rows = np.arange(6) * (count * down * n), np.arange(6) * line
    padded = np.empty(((down - 1) * step + side) * line, np.float32)
    half = np.empty(6 * line, np.float32)
    flat = points.reshape(points.size)
    for image in range(count):
        padded[:] = 0
        for i in range(down):
            half[:] = 0
            for k in range(6):
                for q in range(side):
                    begin = k * line + (q % step * phase + q // step) * channels
                    _combine(half, begin, n, True, matrix[q], flat, (6 * k * count * down + image * down + i) * n, at)
            for q in range(side):
                _combine(padded, (i * step + q) * line, line, True, matrix[q], half, 0, rows)
        for y in range(height):
            for x in range(padding, width + padding):
                begin = (y + padding) * line + (x % step * phase + x // step) * channels
                images[image, y, x - padding] = padded[begin : begin + channels]


class Maps:
    """The maps of one number of taps between images, weights and points."""

    def __init__(self, taps: int) -> None:
        inputs, outputs, weights = _matrices(taps)
        self.step = SIDE + 1 - taps
        self._inputs, self._outputs = inputs, outputs
        self._inputs_back, self._outputs_back = inputs.T.copy(), np.zeros((SIDE, SIDE), np.float32)
        self._outputs_back[:, : self.step] = outputs.T
        self._weights = torch.from_numpy(np.kron(weights, weights).astype(np.float32))

    def inputs(self, x: Tensor, padding: int, points: Tensor) -> None:
        """Map inputs (N, H, W, C) to points."""
        _gather(x.numpy(), self._inputs, SIDE, self.step, padding, points.numpy())

    def inputs_back(self, points: Tensor, padding: int, x: Tensor) -> None:
        """Transpose of `inputs`."""
        _spread(points.numpy(), self._inputs_back, SIDE, self.step, padding, x.numpy())

    def outputs(self, points: Tensor, y: Tensor) -> None:
        """Map points to outputs (N, H', W', K)."""
        _spread(points.numpy(), self._outputs, self.step, self.step, 0, y.numpy())

    def outputs_back(self, y: Tensor, points: Tensor) -> None:
        """Transpose of `outputs`."""
        _gather(y.numpy(), self._outputs_back, self.step, self.step, 0, points.numpy())

    def weights(self, weight: Tensor) -> Tensor:
        """Map weights (K, C, r, r) to points (36, C, K)."""
        outputs, inputs, taps, _ = weight.shape
        return torch.matmul(self._weights, weight.permute(0, 2, 3, 1).reshape(outputs, taps * taps, inputs)).permute(1, 2, 0)

    def weights_back(self, points: Tensor) -> Tensor:
        """Transpose of `weights`: points (36, K, C) to weights (K, C, r, r)."""
        flat = torch.matmul(self._weights.t(), points.permute(1, 0, 2))
        return flat.view(len(flat), SIDE + 1 - self.step, -1, flat.shape[-1]).permute(0, 3, 1, 2)


_MAPS = {taps: Maps(taps) for taps in (3, 5)}


class Winograd(torch.autograd.Function):
    """`convolve` with its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """See `convolve`."""
        maps = _MAPS[weight.shape[-1]]
        images = _rows(x)
        count, height, width, inputs = images.shape
        outputs, _, taps, _ = weight.shape
        y = torch.empty(count, height + 2 * padding + 1 - taps, width + 2 * padding + 1 - taps, outputs)
        at_points = maps.weights(weight)
        tiles = tuple(-(-side // maps.step) for side in y.shape[1:3])
        step = max(1, BLOCK // (SIDE * SIDE * tiles[0] * tiles[1] * max(inputs, outputs)))
        kept = []
        for images_of, y_of in zip(torch.split(images, step), torch.split(y, step), strict=True):
            points = torch.empty(SIDE * SIDE, len(y_of), *tiles, inputs)
            maps.inputs(images_of, padding, points)
            products = torch.bmm(points.view(SIDE * SIDE, -1, inputs), at_points)
            if bias is not None:
                products[SIDE + 1] += bias  # the values of a constant: all at the point (1, 1)
            maps.outputs(products.view(SIDE * SIDE, len(y_of), *tiles, outputs), y_of)
            if ctx.needs_input_grad[1]:
                kept.append(points)
        ctx.maps, ctx.padding, ctx.step, ctx.shape = maps, padding, step, images.shape
        ctx.points, ctx.at_points = kept, at_points
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of x, weight and bias."""
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        maps, rows = ctx.maps, _rows(gradient)
        inputs, outputs = ctx.at_points.shape[1:]
        tiles = tuple(-(-side // maps.step) for side in rows.shape[1:3])
        x = torch.empty(ctx.shape) if to_x else None
        weight = torch.zeros(SIDE * SIDE, outputs, inputs) if to_weight else None
        for index, rows_of in enumerate(torch.split(rows, ctx.step)):
            products = torch.empty(SIDE * SIDE, len(rows_of), *tiles, outputs)
            maps.outputs_back(rows_of, products)
            flat = products.view(SIDE * SIDE, -1, outputs)
            if weight is not None:
                weight.baddbmm_(flat.transpose(1, 2), ctx.points[index].view(SIDE * SIDE, -1, inputs))
            if x is not None:
                points = torch.bmm(flat, ctx.at_points.transpose(1, 2))
                x_of = x[index * ctx.step : index * ctx.step + len(rows_of)]
                maps.inputs_back(points.view(SIDE * SIDE, len(rows_of), *tiles, inputs), ctx.padding, x_of)
        return (
            None if x is None else x.permute(0, 3, 1, 2),
            None if weight is None else maps.weights_back(weight),
            rows.flatten(0, 2).sum(0) if to_bias else None,
            None,
        )


def _rows(images: Tensor) -> Tensor:
    """(N, C, H, W) as contiguous (N, H, W, C)."""
    return images.detach().permute(0, 2, 3, 1).contiguous()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve (N, C, H, W) with (K, C, r, r), r = 3 or 5, step 1: shape (N, K, H', W') with channels-last strides, float32."""
    if not torch.is_grad_enabled():
        weight = weight.detach()  # or the points would be kept for a backward pass that cannot come
    return Winograd.apply(x, weight, bias, padding)  # type: ignore[no-any-return, no-untyped-call]
