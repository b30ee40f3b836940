"""Which weights of a layer are kept, sorted for the sparse kernels: built once a mask, whatever the number of examples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsieve.local.lines import LANES, Indices, compiled

CACHE = 4096
"""numbers that an inner loop may read of several inputs, so that they stay in the first-level cache"""
SHORTEST = 10
"""kept weights an output, below which its sum is not cut further for the cache's sake"""
EXAMPLES = 32
"""examples that a linear layer's sum is cut for; any number works"""


@dataclass(frozen=True, eq=False)
class Lists:
    """Kept weights sorted for one pass: those of list j are begin[j] .. begin[j + 1] - 1."""

    at: Indices
    """where the line of each begins, in units of one pixel"""
    which: Indices
    """place of each among the values"""
    begin: NDArray[np.int64]
    blocks: int
    """blocks of sources that are summed one after another"""

    @cached_property
    def arrays(self) -> tuple[Indices, Indices, NDArray[np.int64], int]:
        """All of it, as compiled functions take it."""
        return self.at, self.which, self.begin, self.blocks


class Pattern:
    """The kept weights of a convolution or linear layer.

    Args:
        kept: bool (outputs, inputs / groups, height, width), or (outputs, inputs) for a linear layer.
        stride: rows and columns from output to output.
        padding: rows and columns of zeros on each side.
        dilation: rows and columns from tap to tap.
        groups: of channels that do not see one another.
    """

    def __init__(
        self,
        kept: NDArray[np.bool_],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        shape = (*kept.shape, 1, 1)[:4]
        self.linear = kept.ndim == 2
        self.outputs, self.inputs, self.groups = shape[0], shape[1] * groups, groups
        self.taps, self.stride, self.padding, self.dilation = (shape[2], shape[3]), stride, padding, dilation
        places = np.unravel_index(np.flatnonzero(kept), shape)
        self._output, source, row, column = (place.astype(np.int32) for place in places)
        self._input = self._output // np.int32(self.outputs // groups) * np.int32(shape[1]) + source
        self._row, self._column = row * np.int32(dilation[0]), column * np.int32(dilation[1])
        self._geometries: dict[tuple[int, int], Geometry] = {}

    @property
    def count(self) -> int:
        """Number of kept weights."""
        return len(self._output)

    @cached_property
    def rows(self) -> tuple[Indices, NDArray[np.int64]]:
        """The input of each weight in row-major order, and where the weights of each output begin."""
        return self._input, np.searchsorted(self._output, np.arange(self.outputs + 1))

    def at(self, height: int, width: int) -> Geometry:
        """Return the sorted weights for images of a size."""
        if (height, width) not in self._geometries:
            self._geometries[height, width] = Geometry(self, height, width)
        return self._geometries[height, width]

    def forward_lists(self, plane: tuple[int, int]) -> Lists:
        """Sort by block of inputs, then by output; `plane` is the height and the columns a phase of the padded images."""
        height, columns = plane
        across = self.stride[1]
        blocks = self._blocks(self.inputs, self.outputs, columns)
        at = ((self._input * height + self._row) * across + self._column % across) * columns + self._column // across
        return _sorted(self._input // -(-self.inputs // blocks) * self.outputs + self._output, at, blocks, self.outputs)

    def backward_lists(self, plane: tuple[int, int], margin: tuple[int, int]) -> Lists:
        """Sort by phase of the row and column that a weight reaches, then by block of outputs, then by input."""
        height, columns = plane
        down, across = self.stride
        blocks = self._blocks(self.outputs, self.inputs, columns) if self.stride == (1, 1) else 1
        at = (self._output * height + margin[0] - self._row // down) * columns + margin[1] - self._column // across
        phase = self._row % down * across + self._column % across
        key = (phase * blocks + self._output // -(-self.outputs // blocks)) * self.inputs + self._input
        return _sorted(key, at, blocks, down * across * self.inputs)

    def _blocks(self, sources: int, sums: int, columns: int) -> int:
        """How many blocks to cut the sources into, so that the lines of one fit the cache and no list gets too short."""
        if self.groups > 1:
            return 1
        line = EXAMPLES if self.linear else self.taps[0] * columns * LANES
        return max(1, min(-(-sources // max(1, CACHE // line)), self.count // (sums * SHORTEST)))


class Geometry:
    """A pattern on images of one size: where everything is.

    Raises:
        ValueError: the images are smaller than the kernel.
    """

    def __init__(self, pattern: Pattern, height: int, width: int) -> None:
        sides = (height, width)
        spans = [(t - 1) * d + 1 for t, d in zip(pattern.taps, pattern.dilation, strict=True)]
        padded = [side + 2 * p for side, p in zip(sides, pattern.padding, strict=True)]
        if any(side < span for side, span in zip(padded, spans, strict=True)):
            raise ValueError(
                f"images of {height} x {width} with padding {pattern.padding} are smaller than the kernel's {spans}"
            )
        self.pattern, self.size = pattern, (height, width)
        rows, columns = ((p - span) // s + 1 for p, span, s in zip(padded, spans, pattern.stride, strict=True))
        self.out = (rows, columns)
        self.plane = (padded[0], -(-padded[1] // pattern.stride[1]))
        before, after = [], []  # margins of the gradient of the outputs
        for side, p, span, s, out in zip(sides, pattern.padding, spans, pattern.stride, self.out, strict=True):
            before.append(max(0, (span - 1) // s - p // s))
            after.append(max(0, (side - 1 + p) // s - (out - 1)))
        self.margin = (before[0], before[1])
        self.plane_back = (before[0] + rows + after[0], before[1] + columns + after[1])
        self.forward = pattern.forward_lists(self.plane)
        self._backward: Lists | None = None

    @property
    def backward(self) -> Lists:
        """The weights sorted for the input gradient."""
        if self._backward is None:
            self._backward = self.pattern.backward_lists(self.plane_back, self.margin)
        return self._backward


def _sorted(key: Indices, at: Indices, blocks: int, lists: int) -> Lists:
    which, begin = _bucketed(key, blocks * lists)
    return Lists(at[which].astype(np.int32), which, begin, blocks)


@compiled
def _bucketed(key: Indices, count: int) -> tuple[Indices, NDArray[np.int64]]:
    """Sort by key in 0..count - 1, stable; return the order and where each key begins."""
    begin = np.zeros(count + 1, np.int64)
    for k in range(len(key)):
        begin[key[k] + 1] += 1
    for j in range(count):
        begin[j + 1] += begin[j]
    place, order = begin[:count].copy(), np.empty(len(key), np.int32)
    for k in range(len(key)):
        order[place[key[k]]] = k
        place[key[k]] += 1
    return order, begin
