"""Vectors in fewer bits, right on average: random positions that both ends draw, and stochastic rounding to a few levels.

    positions   k of a tensor's n numbers are sent, as many by every sender. Which ones, both ends draw from one stream, so
                positions never travel. What is sent counts n / k times.
    levels      between the least and the largest number of a tensor that is sent lie 2**bits evenly spaced levels; each number
                goes to one of its two neighbours, to the nearer one more often, so that its mean is itself. The two ends of the
                range travel as float32.

Source: Konecny et al. 2016, arXiv 1610.05492 (random masks, and probabilistic quantisation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsieve.params import finite
from fedsieve.streams import Stream
from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.message import Message
from fedsieve.wire.sections import Section, integers, vector


@dataclass(frozen=True, slots=True)
class Lossy:
    """How a vector that consists of tensors is sent; both ends know it."""

    sizes: tuple[int, ...]
    """elements of each tensor, >= 1"""
    bits: int = 32
    """of each number that is sent: 1 to 16, or 32 for float32"""
    keep: float = 1.0
    """share of each tensor that is sent, in (0, 1]; at least one element"""

    @property
    def counts(self) -> list[int]:
        """Elements of each tensor that are sent."""
        return [max(1, round(self.keep * size)) for size in self.sizes]

    def positions(self, stream: Stream) -> Tensor:
        """Draw which elements are sent, ascending, int64 of shape (sum(counts),)."""
        if self.keep == 1:
            return torch.arange(sum(self.sizes))
        begins = np.cumsum([0, *self.sizes])
        drawn = [
            begin + stream.choice(size, count) for begin, size, count in zip(begins[:-1], self.sizes, self.counts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(drawn))

    def sections(self, flat: Tensor, positions: Stream, rounding: Stream) -> Mapping[str, Section]:
        """Write a float32 vector: section `update`, and `ranges` unless it is sent as float32.

        Args:
            flat: shape (sum(sizes),).
            positions: the stream that the receiver will draw positions from too.
            rounding: the sender's own.
        """
        sent = flat[self.positions(positions)]
        if self.bits == 32:
            return {"update": vector(sent)}
        top, levels, ranges = (1 << self.bits) - 1, [], []
        for part in torch.split(sent, self.counts):
            low, high = float(part.min()), float(part.max())
            scaled = (part.double().numpy() - low) * (top / (high - low) if high > low else 0.0)
            levels.append(np.minimum(np.floor(scaled + rounding.uniform(len(part))), top).astype(np.int64))
            ranges += [low, high]
        return {"update": integers(np.concatenate(levels)), "ranges": vector(torch.tensor(ranges))}

    def read(self, message: Message) -> Tensor:
        """Read what was sent, each number n / k times itself; float32 of shape (sum(counts),).

        Raises:
            WireError: COUNT, RANGE or NONFINITE, and what reading the sections raises.
        """
        counts = self.counts
        scales = [size / count for size, count in zip(self.sizes, counts, strict=True)]
        if self.bits == 32:
            sent = message.vector("update").double()
            _expect(len(sent), sum(counts), "numbers")
        else:
            sent = self._levels(message)
        parts = [part * scale for part, scale in zip(torch.split(sent, counts), scales, strict=True)]
        values = torch.cat(parts).float()
        if not finite(values):
            raise WireError(Reason.NONFINITE, 0, "an update is beyond the range of float32")
        return values

    def spread(self, values: Tensor, positions: Stream) -> Tensor:
        """Put what was read into its positions, zero elsewhere; shape (sum(sizes),)."""
        if self.keep == 1:
            return values
        flat = torch.zeros(sum(self.sizes))
        flat[self.positions(positions)] = values
        return flat

    def _levels(self, message: Message) -> Tensor:
        counts, top = self.counts, (1 << self.bits) - 1
        levels, ranges = message.integers("update").double(), message.vector("ranges").double()
        _expect(len(levels), sum(counts), "levels")
        _expect(len(ranges), 2 * len(counts), "ends of ranges")
        lows, highs = ranges[::2], ranges[1::2]
        if bool((lows > highs).any()) or float(levels.min()) < 0 or float(levels.max()) > top:
            raise WireError(Reason.RANGE, 0, f"a level is not in [0, {top}], or a range ends before it begins")
        repeats = torch.tensor(counts)
        return lows.repeat_interleave(repeats) + levels * ((highs - lows) / top).repeat_interleave(repeats)


def _expect(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise WireError(Reason.COUNT, 0, f"{found} {what}, not {wanted}")
