"""Numbers of 16 bits: half precision, or bfloat16.

    sent  16 bits for each number

Rounding is to nearest even, so this is not right on average, but errs by 2^-11 (fp16) or 2^-8 (bf16) of each number at most.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fedsieve.compress.base import Caps, Compressor, Frame, Parts, Written
from fedsieve.compress.topk import FORMATS, clamped
from fedsieve.settings import settings
from fedsieve.wire.sections import vector


@settings
class Half(Compressor):
    """Round each number to 16 bits."""

    caps: ClassVar[Caps] = Caps()

    format: Literal["fp16", "bf16"] = "fp16"
    """fp16: 11 significant bits, at most 65504 (larger ones become that); bf16: 8 bits, the range of fp32"""

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write numbers of 16 bits."""
        return {"values": vector(clamped(x, self.format))}, None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read numbers of 16 bits."""
        return parts.floats("values", frame.n, FORMATS[self.format])

    def nominal_bits(self, frame: Frame) -> float:
        """Return 16 d."""
        return 16.0 * frame.n
