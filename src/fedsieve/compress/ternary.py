"""TernGrad: -1, 0 or 1 of a tensor's largest magnitude, right on average (Wen et al. 2017, arXiv 1705.07878).

    sent  one of three values for each number, entropy-coded; 32 bits a tensor

It is QSGD with one level of the largest magnitude.
"""

from __future__ import annotations

from math import log2
from typing import ClassVar

from torch import Tensor

from fedsieve.compress.base import Caps, Compressor, Frame, Parts, Written
from fedsieve.compress.qsgd import quantised, restored
from fedsieve.settings import CountOrZero, settings


@settings
class Ternary(Compressor):
    """Send -1, 0 or 1 times the largest magnitude."""

    caps: ClassVar[Caps] = Caps(unbiased=True)

    bucket: CountOrZero = 0
    """numbers that share a magnitude, >= 0 (0: each tensor has one)"""

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write signs and magnitudes."""
        return quantised(x, frame, 1, "max", self.bucket), None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read signs and magnitudes."""
        return restored(parts, frame, 1, self.bucket)

    def nominal_bits(self, frame: Frame) -> float:
        """Return log2(3) d + 32 for each tensor."""
        return log2(3) * frame.n + 32.0 * len(frame.sizes)
