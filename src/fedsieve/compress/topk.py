"""Top-k with error feedback: the largest changes now, the rest later (Stich et al. 2018, arXiv 1809.07599, algorithm 1).

A client adds what it left out so far, e, to its update x, sends the k largest of p = e + x, and keeps e' = p - what was sent.
So what was sent and what is kept always make up what was to be sent.

    sent  positions of the k, entropy-coded, and 32 bits for each (16 with values = fp16 or bf16)

Deviates: ties go to the lower position. Of a client that is not asked for some rounds, e stays as it is, or fades (`decay`).
"""

from __future__ import annotations

from math import comb, log2
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.compress.base import Caps, Compressor, Frame, Parts, Written
from fedsieve.settings import Density, Threshold, settings
from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.sections import indices, vector

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Format = Literal["fp32", "fp16", "bf16"]


@settings
class TopK(Compressor):
    """Send the largest changes, and remember the others."""

    caps: ClassVar[Caps] = Caps(client_memory=True)

    share: Density = 0.01
    """of the numbers that are sent, in (0, 1]; at least one"""
    ranking: Literal["global", "layer"] = "global"
    """rank magnitudes over the whole vector, or in each tensor separately"""
    values: Format = "fp32"
    """number format of what is sent; what rounding leaves over is remembered too"""
    feedback: bool = True
    """remember what was not sent; without, it is lost"""
    decay: Threshold = 1.0
    """factor of what is remembered, in [0, 1], each time it is added"""

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, Tensor | None]:
        """Write the largest numbers and their positions."""
        total = x if memory is None else x + self.decay * memory
        at = largest(total, frame, self.share, self.ranking)
        sent = clamped(total[torch.from_numpy(at)], self.values)
        left = total.clone()
        left[torch.from_numpy(at)] -= sent.float()
        return {"places": indices(at, frame.sizes), "values": vector(sent)}, left if self.feedback else None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read them into their positions, zero elsewhere."""
        at, x = parts.places("places", frame.sizes), torch.zeros(frame.n)
        if len(at) > most(frame, self.share, self.ranking):
            raise WireError(Reason.COUNT, 0, f"{len(at)} positions, more than share = {self.share} allows")
        x[at] = parts.floats("values", len(at), FORMATS[self.values])
        return x

    def nominal_bits(self, frame: Frame) -> float:
        """Return k b + log2(C(d, k)), b the bits of a value."""
        k = most(frame, self.share, self.ranking)
        return k * 8.0 * FORMATS[self.values].itemsize + choices(frame.n, k)


def most(frame: Frame, share: float, ranking: str) -> int:
    """Return how many numbers are sent of a vector without zeros."""
    return sum(counts(frame, share)) if ranking == "layer" else max(1, round(share * frame.n))


def counts(frame: Frame, share: float) -> list[int]:
    """Return how many numbers are sent of each tensor."""
    return [max(1, round(share * size)) for size in frame.sizes]


def largest(x: Tensor, frame: Frame, share: float, ranking: str) -> NDArray[np.int64]:
    """Return where the largest magnitudes stand, ascending; zeros are never among them."""
    sizes = frame.sizes if ranking == "layer" else [frame.n]
    keep = counts(frame, share) if ranking == "layer" else [most(frame, share, ranking)]
    begins = np.cumsum([0, *sizes])[:-1]
    magnitudes = x.abs().numpy()
    found = [begin + _top(magnitudes[begin : begin + n], k) for begin, n, k in zip(begins, sizes, keep, strict=True)]
    return np.concatenate(found)


def _top(magnitudes: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the positions of the k largest, ascending, the earlier of equal ones first, without zeros."""
    if k >= len(magnitudes):
        return np.flatnonzero(magnitudes)
    least = np.partition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k]
    if least == 0:
        return np.flatnonzero(magnitudes)
    above, equal = np.flatnonzero(magnitudes > least), np.flatnonzero(magnitudes == least)
    return np.sort(np.concatenate([above, equal[: k - len(above)]]))


def clamped(x: Tensor, name: Format) -> Tensor:
    """Return numbers in a format, the largest of the format where they are beyond it."""
    dtype = FORMATS[name]
    return x if dtype == x.dtype else x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def choices(n: int, k: int) -> float:
    """Return log2(C(n, k))."""
    return log2(comb(n, k)) if n < 1000 else float(np.sum(np.log2(np.arange(n - k + 1, n + 1)) - np.log2(np.arange(1, k + 1))))
