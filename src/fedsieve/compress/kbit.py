"""Whole numbers of k bits by stochastic rounding, with one scale for each tensor (Konecny et al. 2016, arXiv 1610.05492).

    sent  a whole number in [-t, t] for each number, t = 2^(k-1) - 1, entropy-coded by their histogram; 32 bits a tensor

The scale is the largest magnitude of a tensor, so zero stays zero and the mean of what a number becomes is the number itself.

Deviates: levels are symmetric around zero; the source spreads 2^k of them from the least to the largest number.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fedsieve.compress.base import Caps, Compressor, Frame, Parts, Written
from fedsieve.compress.qsgd import quantised, restored
from fedsieve.settings import settings


@settings
class Kbit(Compressor):
    """Round each number to k bits, right on average."""

    caps: ClassVar[Caps] = Caps(unbiased=True)

    bits: Annotated[int, Field(ge=2, le=12)] = 8
    """of each number, 2 to 12"""

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write whole numbers and scales."""
        return quantised(x, frame, self._top, "max", 0), None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read whole numbers and scales."""
        return restored(parts, frame, self._top, 0)

    def nominal_bits(self, frame: Frame) -> float:
        """Return k d + 32 for each tensor."""
        return self.bits * frame.n + 32.0 * len(frame.sizes)

    @property
    def _top(self) -> int:
        return (1 << self.bits - 1) - 1
