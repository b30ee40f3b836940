"""STC: the signs of the largest changes, and one magnitude (Sattler, Wiedemann, Mueller and Samek 2019, arXiv 1903.02891).

As top-k with error feedback, but each of the k numbers is sent as its sign times the mean of their magnitudes, mu.

    sent  -1, 0 or 1 for each number, entropy-coded, and 32 bits for mu

Deviates: entropy codes in place of Golomb's. In the broadcast an increment goes to the model that clients hold, which remembers
what was left out by itself.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsieve.compress.base import Caps, Compressor, Frame, Parts, Written
from fedsieve.compress.topk import choices, largest, most
from fedsieve.settings import Density, Threshold, settings
from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.sections import integers, vector


@settings
class Stc(Compressor):
    """Send the signs of the largest changes, and remember the rest."""

    caps: ClassVar[Caps] = Caps(client_memory=True)

    share: Density = 0.01
    """of the numbers that are sent, in (0, 1]; at least one"""
    ranking: Literal["global", "layer"] = "global"
    """rank magnitudes over the whole vector, or in each tensor separately (with one mu all the same)"""
    feedback: bool = True
    """remember what was not sent; without, it is lost"""
    decay: Threshold = 1.0
    """factor of what is remembered, in [0, 1], each time it is added"""

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, Tensor | None]:
        """Write signs and their magnitude."""
        total = x if memory is None else x + self.decay * memory
        at = torch.from_numpy(largest(total, frame, self.share, self.ranking))
        signs = torch.zeros(frame.n, dtype=torch.int32)
        signs[at] = torch.sign(total[at]).int()
        mu = total[at].abs().double().mean().float().reshape(1) if len(at) else torch.zeros(1)
        left = total - signs * mu
        return {"signs": integers(signs), "scale": vector(mu)}, left if self.feedback else None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read signs and their magnitude."""
        mu = parts.floats("scale", 1)
        if float(mu) < 0:
            raise WireError(Reason.RANGE, 0, f"a magnitude is {float(mu)}")
        return parts.integers("signs", frame.n, -1, 1) * mu

    def nominal_bits(self, frame: Frame) -> float:
        """Return log2(C(d, k)) + k + 32."""
        k = most(frame, self.share, self.ranking)
        return choices(frame.n, k) + k + 32
