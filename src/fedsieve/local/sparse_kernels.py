"""Convolutions and linear layers over their kept weights only: forward, input gradient and weight gradient, on one CPU thread.

Images are held with examples last in memory, so that what one weight is applied to is a line of neighbouring numbers, a row of
outputs of several examples at once, and the work falls with the number of kept weights:

    y[o, r] = bias[o] + sum over kept (o, i, u, v) of w * x[i, r * stride + u, v:]      lines of columns x examples

The input gradient is the same sum over the same weights sorted by input; the weight gradient one product of two lines a weight
and row. A linear layer is a convolution of images of one pixel. Max pooling and ReLU that follow are applied to each row of
outputs while it is in the cache, and what comes out is written where the next layer reads it, zeros around it included: layers
one behind the other are one `Chain`, in which nothing is converted.

Inside a chain, images stand in blocks of eight examples, (blocks, C, H, W, 8), and what a linear layer reads is (features, B).
One example without gradients stands alone, as (C, H, W): a line is then a row of it.
Outside they are (C, H, W, B): to PyTorch tensors (B, C, H, W) whose strides say where the elements are, so its element-wise
functions keep that order between chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsieve.local.lines import LANES, PIECE, Floats, Indices, compiled, copied, dots, gather, largest, pieces, routed
from fedsieve.local.patterns import Pattern

SIZES = 8
"""sizes and numbers of images whose memory a chain keeps"""

Bytes = NDArray[np.uint8]
_Lists = tuple[Indices, Indices, NDArray[np.int64], int]
_Ones = tuple[Floats, Indices, Indices]
_Kept = tuple[Floats, Floats, Bytes | None]
"""inputs, values and taps of a stage"""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A layer, and the max pooling and ReLU that follow it."""

    pattern: Pattern
    window: tuple[int, int] = (1, 1)
    """of the pooling; windows stand side by side"""
    relu: bool = False


class _Sizes(NamedTuple):
    """Numbers of a stage on images of one size; lengths and distances count elements of flat arrays."""

    blocks: int
    examples: int
    """of a block"""
    last: int
    """examples of the last block"""
    outputs: int
    block: int
    """from block to block of inputs"""
    step: int
    """from row to row of outputs, in the inputs"""
    length: int
    """of a row of outputs"""
    window: tuple[int, int]
    rows: int
    """of windows"""
    columns: int
    left_rows: int
    """rows of outputs that no window covers"""
    left: int
    """elements of a row of outputs that no window covers"""


class _Place(NamedTuple):
    """Where images stand: distances in a flat array, in which column c is at phase c % phases, place c // phases."""

    block: int
    plane: int
    row: int
    pixel: int
    phases: int
    width: int
    """places of a phase"""
    top: int
    """rows of zeros before the images"""
    before: int
    """columns of zeros before the images"""


def _outside(height: int, width: int, examples: int) -> _Place:
    """Images as (C, H, W, B)."""
    return _Place(LANES, height * width * examples, width * examples, examples, 1, width, 0, 0)


def _inside(
    channels: int, height: int, width: int, phases: int = 1, top: int = 0, before: int = 0, block: int = LANES
) -> _Place:
    """Images in blocks within zeros: (blocks, C, height, phases, width, examples of a block)."""
    row = phases * width * block
    return _Place(channels * height * row, height * row, row, block, phases, width, top, before)


@compiled
def _at(place: _Place, block: int, channel: int, row: int) -> int:
    """Where a row of images begins."""
    return block * place.block + channel * place.plane + (row + place.top) * place.row


@compiled
def _pixel(place: _Place, column: int) -> int:
    """Where a pixel stands in its row."""
    c = column + place.before
    if place.phases == 1:  # divisions take long
        return c * place.pixel
    return (c % place.phases * place.width + c // place.phases) * place.pixel


@compiled
def _sums(
    y: Floats,
    to: int,
    plane: int,
    row: int,
    x: Floats,
    base: int,
    step: int,
    lists: _Lists,
    values: Floats,
    scale: int,
    start: Floats,
    rows: int,
    cut: NDArray[np.int64],
) -> None:
    """Sum lines of x into each row of each output: outputs are `plane` apart in y, rows `row` apart, and `step` in x."""
    at, which, begin, blocks = lists
    outputs = len(start)
    for r in range(rows):
        for c in range(len(cut)):
            offset, vectors, tail = cut[c, 0], cut[c, 1], cut[c, 2]
            source = base + r * step
            for g in range(blocks):
                for o in range(outputs):
                    first, last = begin[g * outputs + o], begin[g * outputs + o + 1]
                    if g == 0 or first < last:
                        out = to + o * plane + r * row
                        gather(
                            offset, vectors, tail, y, out, x, source, at, which, values, first, last, scale, start[o], g == 0
                        )


@compiled
def _products(
    y: Floats,
    origin: int,
    plane: int,
    row: int,
    x: Floats,
    base: int,
    step: int,
    lists: _Lists,
    grad: Floats,
    bias: Floats,
    ones: _Ones,
    scale: int,
    rows: int,
    cut: NDArray[np.int64],
) -> None:
    """Add the product of each row of each output with the line of x that each of its weights is applied to.

    The bias is a weight that is applied to a line of ones.
    """
    at, which, begin, blocks = lists
    line, nowhere, own = ones
    outputs = len(bias)
    for r in range(rows):
        for c in range(len(cut)):
            offset, vectors, tail = cut[c, 0], cut[c, 1], cut[c, 2]
            for g in range(blocks):
                for o in range(outputs):
                    first, last, out = begin[g * outputs + o], begin[g * outputs + o + 1], origin + o * plane + r * row
                    if first < last:
                        dots(offset, vectors, tail, y, out, x, base + r * step, at, which, grad, first, last, scale)
                    if g == 0:
                        dots(0, vectors, tail, y, out + offset, line, 0, nowhere, own, bias, o, o + 1, scale)


@compiled
def _forward(
    x: Floats,
    lists: _Lists,
    values: Floats,
    start: Floats,
    sizes: _Sizes,
    rows: Floats,
    window: NDArray[np.int64],
    relu: bool,
    y: Floats,
    place: _Place,
    taps: Bytes | None,
) -> None:
    """Compute the outputs of a stage row by row of windows, and write what is left of each where the next stage reads it."""
    high, wide = sizes.window
    examples, cut, length = sizes.examples, pieces(sizes.length), sizes.length
    for b in range(sizes.blocks):
        # Blank examples are written too, unless another block's stand in their place.
        count = sizes.last if b == sizes.blocks - 1 and place.pixel != examples else examples
        for h in range(sizes.rows):
            base = b * sizes.block + h * high * sizes.step
            _sums(rows, 0, high * length, length, x, base, sizes.step, lists, values, examples, start, high, cut)
            for o in range(sizes.outputs):
                to, tap = _at(place, b, o, h), ((b * sizes.outputs + o) * sizes.rows + h) * sizes.columns * examples
                source = o * high * length
                if place.phases == 1:
                    to, many = to + place.before * place.pixel, sizes.columns
                    largest(y, to, place.pixel, taps, tap, examples, rows, source, wide * examples, window, many, count, relu)
                    continue
                for w in range(sizes.columns):
                    pixel, base = to + _pixel(place, w), source + w * wide * examples
                    largest(y, pixel, 0, taps, tap + w * examples, 0, rows, base, 0, window, 1, count, relu)


@compiled
def _forward_one(
    x: Floats,
    lists: _Lists,
    values: Floats,
    start: Floats,
    sizes: _Sizes,
    rows: Floats,
    window: NDArray[np.int64],
    relu: bool,
    y: Floats,
    place: _Place,
) -> None:
    """`_forward` of one example that stands alone; nobody asks for its gradient, so no taps are kept."""
    high, wide = sizes.window
    cut, length = pieces(sizes.length), sizes.length
    for h in range(sizes.rows):
        _sums(rows, 0, high * length, length, x, h * high * sizes.step, sizes.step, lists, values, 1, start, high, cut)
        for o in range(sizes.outputs):
            to = _at(place, 0, o, h)
            for w in range(sizes.columns):
                source = o * high * length + w * wide
                best = rows[source]
                for k in range(1, len(window)):
                    tap = rows[source + window[k]]
                    if tap > best or tap != tap:
                        best = tap
                if relu and best <= 0:
                    best = np.float32(0)
                y[to + _pixel(place, w)] = best


@compiled
def _linear_one(
    x: Floats, source: Indices, begin: NDArray[np.int64], values: Floats, start: Floats, relu: bool, y: Floats
) -> None:
    """Compute a linear layer on one example that stands alone, in the order of the values: it is bound by reading them."""
    for o in range(len(start)):
        total = start[o]
        for k in range(begin[o], begin[o + 1]):
            total += values[k] * x[source[k]]
        y[o] = np.float32(0) if relu and total <= 0 else total


@compiled
def _backward(
    y: Floats,
    place: _Place,
    taps: Bytes,
    sizes: _Sizes,
    window: NDArray[np.int64],
    whole: bool,
    out: Floats,
    frame: _Place,
    x: Floats,
    lists: _Lists,
    grad: Floats,
    bias: Floats,
    ones: _Ones,
) -> None:
    """Hand the gradient of each window to the output that it came from, and add up the gradients of weights and bias.

    With `whole`, the gradient of all outputs is written within zeros, for the input gradient; else `out` holds a row of windows
    at a time.
    """
    high, wide = sizes.window
    examples, cut, length = sizes.examples, pieces(sizes.length), sizes.length
    for b in range(sizes.blocks):
        count = sizes.last if b == sizes.blocks - 1 and place.pixel != examples else examples
        if count < examples and not whole:
            out[:] = 0  # of the block before: blank examples have no gradient
        for h in range(sizes.rows):
            begin = b * frame.block + (frame.top + h * high) * frame.row + frame.before * examples if whole else 0
            for o in range(sizes.outputs):
                source, tap = _at(place, b, o, h), ((b * sizes.outputs + o) * sizes.rows + h) * sizes.columns * examples
                to = begin + o * frame.plane
                routed(y, source, place.pixel, taps, tap, examples, out, to, wide * examples, window, sizes.columns, count)
                if sizes.left:
                    for r in range(high):
                        out[to + r * frame.row + length - sizes.left : to + r * frame.row + length] = 0
            base = b * sizes.block + h * high * sizes.step
            _products(out, begin, frame.plane, frame.row, x, base, sizes.step, lists, grad, bias, ones, examples, high, cut)
        if whole and sizes.left_rows:
            for o in range(sizes.outputs):
                for h in range(sizes.rows * high, sizes.rows * high + sizes.left_rows):
                    to = _at(frame, b, o, h) + frame.before * examples
                    out[to : to + length] = 0


@compiled
def _back(
    x: Floats,
    height: int,
    width: int,
    y: Floats,
    frame: _Place,
    lists: _Lists,
    values: Floats,
    padding: tuple[int, int],
    sizes: _Sizes,
    nothing: Floats,
) -> None:
    """Sum lines of the gradient of the outputs into that of the inputs, (blocks, C, H, W, examples), rows one apart."""
    length, channels = width * sizes.examples, len(nothing)
    plane, cut = height * length, pieces(length)
    inside = padding[0] * frame.row + padding[1] * sizes.examples
    for b in range(sizes.blocks):
        base = b * frame.block + inside
        to = b * channels * plane
        _sums(x, to, plane, length, y, base, frame.row, lists, values, sizes.examples, nothing, height, cut)


@compiled
def _strided_back(
    x: Floats,
    height: int,
    width: int,
    y: Floats,
    frame: _Place,
    lists: _Lists,
    values: Floats,
    stride: tuple[int, int],
    padding: tuple[int, int],
    sizes: _Sizes,
    channels: int,
) -> None:
    """Sum lines of the outputs' gradient into that of the inputs, (blocks, C, H, W, examples), where outputs are apart."""
    at, which, begin, _ = lists
    (down, across), examples = stride, sizes.examples
    line = np.empty(-(-width // across) * examples, np.float32)
    for b in range(sizes.blocks):
        for h in range(height):
            for phase in range(across):
                column = (phase - padding[1]) % across
                count = (width - column + across - 1) // across
                if count <= 0:
                    continue
                cut = pieces(count * examples)
                base = b * frame.block + (h + padding[0]) // down * frame.row + (column + padding[1]) // across * examples
                for i in range(channels):
                    j = ((h + padding[0]) % down * across + phase) * channels + i
                    first, last = begin[j], begin[j + 1]
                    for c in range(len(cut)):
                        offset, vectors, tail = cut[c, 0], cut[c, 1], cut[c, 2]
                        gather(offset, vectors, tail, line, 0, y, base, at, which, values, first, last, examples, 0.0, True)
                    to = ((b * channels + i) * height + h) * width + column
                    for w in range(count):
                        pixel = (to + w * across) * examples
                        x[pixel : pixel + examples] = line[w * examples : (w + 1) * examples]


@compiled
def _blocked(x: Floats, shape: tuple[int, int, int, int], y: Floats, place: _Place) -> None:
    """Copy images (C, H, W, B) into blocks."""
    channels, height, width, examples = shape
    for i in range(channels):
        for h in range(height):
            source = (i * height + h) * width * examples
            if place.pixel == 1 and place.phases == 1:
                copied(y, _at(place, 0, i, h) + place.before, 0, x, source, 0, 1, width)
                continue
            for b in range((examples + LANES - 1) // LANES):
                to, base, count = _at(place, b, i, h), source + b * LANES, min(LANES, examples - b * LANES)
                if place.phases == 1:
                    copied(y, to + place.before * LANES, LANES, x, base, examples, width, count)
                    continue
                for w in range(width):
                    copied(y, to + _pixel(place, w), LANES, x, base + w * examples, examples, 1, count)


@compiled
def _unblocked(x: Floats, shape: tuple[int, int, int, int], y: Floats) -> None:
    """Copy images out of blocks, (blocks, C, H, W, 8), into (C, H, W, B)."""
    channels, height, width, examples = shape
    for i in range(channels):
        for h in range(height):
            for b in range((examples + LANES - 1) // LANES):
                base, count = ((b * channels + i) * height + h) * width * LANES, min(LANES, examples - b * LANES)
                copied(y, (i * height + h) * width * examples + b * LANES, examples, x, base, LANES, width, count)


def examples_last(images: Tensor) -> Tensor:
    """Return (B, C, H, W) as contiguous (C, H, W, B): the same memory, if it has that order already."""
    return images.detach().permute(1, 2, 3, 0).contiguous()


class _Step:
    """A stage on images of one size, a number of them: all that is known before the images are.

    Memory that is written anew each time is kept from call to call, with the zeros that stand around images in it.

    Args:
        stage: the stage.
        size: height and width of the images.
        examples: how many.
        alone: it is one example, and nobody asks for gradients.
    """

    def __init__(self, stage: Stage, size: tuple[int, int], examples: int, alone: bool) -> None:
        self.stage, self.examples, self.linear, self.alone = stage, examples, stage.pattern.linear, alone
        self.pattern, self.to = stage.pattern, stage.pattern.at(*size)
        (height, width), (high, wide), block = self.to.out, stage.window, examples if self.linear or alone else LANES
        rows, columns, blocks = height // high, width // wide, -(-examples // block)
        x_row = self.pattern.stride[1] * self.to.plane[1] * block
        self.sizes = _Sizes(
            blocks,
            block,
            examples - (blocks - 1) * block,
            self.pattern.outputs,
            block=self.pattern.inputs * self.to.plane[0] * x_row,
            step=self.pattern.stride[0] * x_row,
            length=width * block,
            window=stage.window,
            rows=rows,
            columns=columns,
            left_rows=height - rows * high,
            left=(width - columns * wide) * block,
        )
        self.out, self.outputs = (rows, columns), self.pattern.outputs * rows * columns
        self.place = _outside(*size, examples)
        """where the images stand that this stage reads"""
        if not self.linear:
            self.place = _inside(
                self.pattern.inputs, *self.to.plane, self.pattern.stride[1], *self.pattern.padding, 1 if alone else LANES
            )
        self.into = _outside(rows, columns, examples)
        """where those go that it writes"""
        self._rows = _memory(self.sizes.outputs * high * self.sizes.length)
        self._window = _taps(stage.window, self.sizes.length, block)
        self._ones = _ones(self.sizes.outputs)
        self._gradients: dict[bool, tuple[Floats, _Place, NDArray[np.int64]]] = {}
        self._spare: list[Floats] = []

    def room(self) -> Floats:
        """Return memory for the images that this stage reads, with zeros around them and for examples that a block lacks."""
        if self._spare:
            return self._spare.pop()
        if self.linear:
            return _memory(self.pattern.inputs * self.examples)
        x = _memory(self.sizes.blocks * self.place.block)
        x[:] = 0
        return x

    def give_back(self, x: Floats) -> None:
        """Take memory back that `room` gave."""
        self._spare.append(x)

    def forward(self, x: Floats, values: Floats, start: Floats, y: Floats, keep: bool) -> Bytes | None:
        """Compute the outputs and write them to their place in y; return the tap of each if they are to be kept."""
        sizes, lists, relu = self.sizes, self.to.forward.arrays, self.stage.relu
        if self.alone and self.linear:
            _linear_one(x, *self.pattern.rows, values, start, relu, y)
            return None
        if self.alone:
            _forward_one(x, lists, values, start, sizes, self._rows, self._window, relu, y, self.into)
            return None
        taps = np.empty(sizes.blocks * self.outputs * sizes.examples, np.uint8) if keep else None
        _forward(x, lists, values, start, sizes, self._rows, self._window, relu, y, self.into, taps)
        return taps

    def backward(
        self, y: Floats, place: _Place, x: Floats, values: Floats, taps: Bytes, to_x: bool
    ) -> tuple[Floats, Floats, Floats]:
        """Return the gradients of inputs (blocks without zeros around; empty if not wanted), values and bias."""
        out, frame, window = self._gradient(to_x)
        grad, bias = np.zeros(len(values), np.float32), np.zeros(self.sizes.outputs, np.float32)
        lists = self.to.forward.arrays
        _backward(y, place, taps, self.sizes, window, to_x, out, frame, x, lists, grad, bias, self._ones)
        return self._input_gradient(out, frame, values) if to_x else _NOTHING, grad, bias

    def _gradient(self, whole: bool) -> tuple[Floats, _Place, NDArray[np.int64]]:
        """Memory for the gradient of the layer's outputs, whole or a row of windows; where it stands; and its windows' taps."""
        if whole not in self._gradients:
            sizes, images = self.sizes, self.sizes.outputs
            frame = _Place(0, sizes.window[0] * sizes.length, sizes.length, sizes.examples, 1, 0, 0, 0)
            if whole:
                rows, columns = self.to.plane_back
                row, images = columns * sizes.examples, images * sizes.blocks
                frame = _Place(sizes.outputs * rows * row, rows * row, row, sizes.examples, 1, columns, *self.to.margin)
            out = _memory(images * frame.plane)
            out[:] = 0
            self._gradients[whole] = out, frame, _taps(sizes.window, frame.row, sizes.examples)
        return self._gradients[whole]

    def _input_gradient(self, y: Floats, frame: _Place, values: Floats) -> Floats:
        pattern, sizes, (height, width) = self.pattern, self.sizes, self.to.size
        x = _memory(sizes.blocks * pattern.inputs * height * width * sizes.examples)
        lines = (x, height, width, y, frame, self.to.backward.arrays, values)
        if pattern.stride == (1, 1):
            _back(*lines, pattern.padding, sizes, np.zeros(pattern.inputs, np.float32))
        else:
            _strided_back(*lines, pattern.stride, pattern.padding, sizes, pattern.inputs)
        return x


class Chain:
    """Stages one behind the other; before a linear one, images are flattened channel by channel."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)
        self._steps: dict[tuple[int, int, int, bool], list[_Step]] = {}

    def __call__(self, x: Tensor, values: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """Map (B, C, H, W) to the outputs of the last stage, by the kept values and the bias of each stage."""
        weights = (*values, *biases)
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *weights)):
            return _Chained.apply(self, x, *weights)  # type: ignore[no-any-return, no-untyped-call]
        y, steps, kept = self.forward(x, weights, keep=False)
        _give_back(steps, kept)
        return y

    def on(self, height: int, width: int, examples: int, alone: bool) -> list[_Step]:
        """Return the stages for images of a size, a number of them."""
        key = (height, width, examples, alone)
        if key not in self._steps:
            size, steps = (height, width), list[_Step]()
            for stage in self._stages:
                step = _Step(stage, (1, 1) if steps and stage.pattern.linear else size, examples, alone)
                if steps and not step.linear:
                    steps[-1].into = step.place
                steps.append(step)
                size = step.out
            if len(self._steps) == SIZES:
                self._steps.pop(next(iter(self._steps)))
            self._steps[key] = steps
        return self._steps[key]

    def forward(self, x: Tensor, weights: Sequence[Tensor | None], *, keep: bool) -> tuple[Tensor, list[_Step], list[_Kept]]:
        """Return the outputs, the stages, and what each has read, with its taps if asked to keep them.

        The weights are the values of all stages, then their biases.
        """
        images = examples_last(x).numpy()
        *_, height, width, examples = images.shape
        steps = self.on(height, width, examples, examples == 1 and not keep)
        values = [of.detach().numpy() for of in weights[: len(steps)] if of is not None]
        source = images.reshape(-1)
        if not steps[0].linear:
            source = steps[0].room()
            _blocked(images.reshape(-1), images.shape, source, steps[0].place)
        kept = []
        for index, (step, of, bias) in enumerate(zip(steps, values, weights[len(steps) :], strict=True)):
            y = steps[index + 1].room() if index + 1 < len(steps) else _memory(step.outputs * examples)
            start = np.zeros(step.sizes.outputs, np.float32) if bias is None else bias.detach().numpy()
            kept.append((source, of, step.forward(source, of, start, y, keep)))
            source = y
        return torch.from_numpy(source).view(-1, *steps[-1].out, examples).permute(3, 0, 1, 2), steps, kept


class _Chained(torch.autograd.Function):
    """A chain with its backward pass."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *weights: Any) -> Tensor:
        """See `Chain`."""
        y, ctx.steps, ctx.kept = chain.forward(x, weights, keep=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, values and biases."""
        steps: list[_Step] = ctx.steps
        if not ctx.kept:
            raise RuntimeError("a sparse layer's gradient can be asked for once: its memory has been used again")
        to_x, count = ctx.needs_input_grad[1], len(steps)
        grads: list[Tensor | None] = [None] * (2 * count)
        y, place = examples_last(gradient).view(-1).numpy(), _outside(*steps[-1].out, steps[-1].examples)
        for index in range(count - 1, -1, -1):
            step, (x, values, taps) = steps[index], ctx.kept[index]
            y, grad, bias = step.backward(y, place, x, values, taps, index > 0 or to_x)
            grads[index] = torch.from_numpy(grad)
            if ctx.needs_input_grad[2 + count + index]:
                grads[count + index] = torch.from_numpy(bias)
            before = steps[index - 1]
            place = _outside(*before.out, step.examples) if step.linear else _inside(before.sizes.outputs, *before.out)
        _give_back(steps, ctx.kept)
        ctx.kept = []
        if not to_x:
            return None, None, *grads
        shape = (steps[0].pattern.inputs, *steps[0].to.size, steps[0].examples)
        if not steps[0].linear:
            blocks, y = y, _memory(prod(shape))
            _unblocked(blocks, shape, y)
        return None, torch.from_numpy(y).view(shape).permute(3, 0, 1, 2), *grads


def _give_back(steps: Sequence[_Step], kept: Sequence[_Kept]) -> None:
    """Give the memory of the images back that a chain has read."""
    for index, (step, (x, *_)) in enumerate(zip(steps, kept, strict=True)):
        if index or not step.linear:
            step.give_back(x)


_NOTHING = np.empty(0, np.float32)


def _memory(size: int) -> Floats:
    """Memory that begins at a multiple of 64 bytes, as vectors are loaded fastest from; numpy's own need not."""
    return torch.empty(size).numpy()


@lru_cache
def _ones(outputs: int) -> _Ones:
    """Return a line of ones, and for each output where it begins and where the output's sum stands."""
    return np.ones(PIECE * LANES, np.float32), np.zeros(outputs, np.int32), np.arange(outputs, dtype=np.int32)


@lru_cache
def _taps(window: tuple[int, int], row: int, pixel: int) -> NDArray[np.int64]:
    """Where the taps of a window stand, in rows of so many elements."""
    high, wide = window
    taps: NDArray[np.int64] = (np.arange(high)[:, None] * row + np.arange(wide) * pixel).ravel()
    return taps


def convolve(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """Convolve (B, C, H, W) with the kept weights `values`, in row-major order; the result has the examples last in memory."""
    return Chain([Stage(pattern)])(x, [values], [bias])


def linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """Map (..., inputs) to (..., outputs) by the kept weights; the result has the rows last in memory."""
    rows = x.reshape(-1, x.shape[-1])[:, :, None, None]
    return convolve(rows, values, bias, pattern).view(len(rows), -1).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return, no-untyped-call]
