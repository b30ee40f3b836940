"""Rand-k: random numbers of a vector, right on average (Konecny and Richtarik 2018, arXiv 1611.07555).

    sent  k of the n numbers of a vector, 32 bits each (fewer with `bits`)

Which k, both ends draw from one stream, so positions never travel. What is sent counts n / k times. Squared error n / k - 1
times the squared vector: more than 1, so it lives by the mean over many clients or rounds.

Deviates: where share * n is no whole number, k is one of the two around it, drawn so that each number is sent with a
probability of exactly `share`, whatever clients hold; n / k is then 1 / share.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsieve.compress import levels
from fedsieve.compress.base import Caps, Compressor, Frame, Parts, Written
from fedsieve.settings import Density, settings
from fedsieve.wire.sections import integers, vector

Width = Annotated[int, Field(ge=2, le=32)]


@settings
class RandK(Compressor):
    """Send random numbers, and multiply them by how few they are."""

    caps: ClassVar[Caps] = Caps(unbiased=True)

    share: Density = 0.1
    """of the numbers that are sent, in (0, 1]"""
    bits: Width = 32
    """of each number that is sent, 2 to 32: float32, or fewer, rounded to levels of the largest magnitude, right on average"""

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write numbers at random positions."""
        return written(x, frame, self.share, self.bits), None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read them into their positions, each 1 / share times itself, zero elsewhere."""
        return spread(sent(parts, frame, self.share, self.bits) / self.share, frame, self.share)

    def nominal_bits(self, frame: Frame) -> float:
        """Return k b + 64, b the bits of a number."""
        return self.bits * self.share * frame.n + 64


def written(x: Tensor, frame: Frame, share: float, bits: int) -> Written:
    """Write the numbers at the drawn positions."""
    chosen = x[torch.from_numpy(frame.positions(share))]
    if bits == 32 or not len(chosen):
        return {"values": vector(chosen)}
    lengths = np.array([len(chosen)])
    norms = levels.scales(chosen, lengths, "max")
    rounded = levels.rounded(chosen, lengths, norms, top(bits), frame.stream("levels"))
    return {"levels": integers(rounded), "norms": vector(torch.from_numpy(norms))}


def sent(parts: Parts, frame: Frame, share: float, bits: int) -> Tensor:
    """Read what `written` wrote, float32 of shape (k,)."""
    k = len(frame.positions(share))
    if bits == 32 or not k:
        return parts.floats("values", k)
    return levels.restored(
        parts.integers("levels", k, -top(bits), top(bits)), np.array([k]), parts.floats("norms", 1), top(bits)
    )


def spread(values: Tensor, frame: Frame, share: float) -> Tensor:
    """Put numbers at the drawn positions, zero elsewhere, shape (n,)."""
    x = torch.zeros(frame.n)
    x[torch.from_numpy(frame.positions(share))] = values
    return x


def top(bits: int) -> int:
    """Return the largest level of so many bits."""
    return (1 << bits - 1) - 1
