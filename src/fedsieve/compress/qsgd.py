"""QSGD: stochastic levels of a bucket's norm (Alistarh et al. 2017, arXiv 1610.02132, section 3.1).

With s levels, x_j of a bucket x becomes |x| sign(x_j) l_j / s, l_j one of the two whole numbers around s |x_j| / |x|, so that
its mean is x_j. Squared error: at most min(d / s^2, sqrt(d) / s) times |x|^2 for a bucket of d numbers with norm = l2.

    sent  a level in [-s, s] for each number, entropy-coded by the histogram of all, and 32 bits a bucket

Deviates: levels are entropy-coded in place of Elias codes. Buckets end where tensors end.
"""

from __future__ import annotations

from math import ceil, log2
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsieve.compress import levels
from fedsieve.compress.base import Caps, Compressor, Frame, Parts, Written
from fedsieve.settings import CountOrZero, settings
from fedsieve.wire.sections import integers, vector

Levels = Annotated[int, Field(ge=1, le=2047)]


@settings
class Qsgd(Compressor):
    """Round each number to a few levels of its bucket's norm, right on average."""

    caps: ClassVar[Caps] = Caps(unbiased=True)

    levels: Levels = 7
    """levels above 0, 1 to 2047: a number becomes one of 2 * levels + 1"""
    norm: Literal["l2", "max"] = "l2"
    """what levels are shares of: the Euclidean norm of the bucket, or its largest magnitude, which is far more exact"""
    bucket: CountOrZero = 512
    """numbers that share a norm, >= 0 (0: each tensor has one)"""

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write levels and norms."""
        return quantised(x, frame, self.levels, self.norm, self.bucket), None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read levels and norms."""
        return restored(parts, frame, self.levels, self.bucket)

    def nominal_bits(self, frame: Frame) -> float:
        """Return d (ceil(log2(s + 1)) + 1) + 32 for each bucket."""
        return nominal(frame, self.levels, self.bucket)


def quantised(x: Tensor, frame: Frame, top: int, norm: str, bucket: int) -> Written:
    """Write a vector by so many levels."""
    lengths = levels.buckets(frame.sizes, bucket)
    norms = levels.scales(x, lengths, norm)
    chosen = levels.rounded(x, lengths, norms, top, frame.stream("levels"))
    return {"levels": integers(chosen), "norms": vector(torch.from_numpy(norms))}


def restored(parts: Parts, frame: Frame, top: int, bucket: int) -> Tensor:
    """Read what `quantised` wrote."""
    lengths = levels.buckets(frame.sizes, bucket)
    norms = parts.floats("norms", len(lengths))
    return levels.restored(parts.integers("levels", frame.n, -top, top), lengths, norms, top)


def nominal(frame: Frame, top: int, bucket: int) -> float:
    """Return the bits of level, sign and norm without an entropy code."""
    return frame.n * (ceil(log2(top + 1)) + 1) + 32 * len(levels.buckets(frame.sizes, bucket))
