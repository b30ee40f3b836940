"""Rand-k-Spatial: Rand-k, decoded by how many clients sent each number (Jhunjhunwala et al. 2021, arXiv 2110.07751).

    sent  as randk; with transform = opt 64 bits more: the squared vector

Where clients' vectors are alike, a number that several sent is known well and one that none sent is missed by all. The decoder
weights each number by beta / T(M), M the clients that sent it (`collisions.py`); positions are drawn, so M is known before any
value is looked at, and the mean over the cohort stays right on average, with any weights of clients.

The ratio R2 / R1 that opt goes by is that of the round before, estimated from what was sent then: of this round's it would not
be independent of the positions.

Deviates: positions are drawn as in randk, so clients may hold different numbers of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.compress.base import Arrived, Caps, Compressor, Frame, Parts, Written
from fedsieve.compress.collisions import Transform, factors
from fedsieve.compress.randk import Width, sent, spread, written
from fedsieve.settings import Density, settings
from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.sections import number


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    """What is known of a cohort before its values are looked at."""

    factors: NDArray[np.float32]
    """beta / T(M) of each trained number of the model"""


@settings
class RandKSpatial(Compressor):
    """Send random numbers, and decode them together."""

    caps: ClassVar[Caps] = Caps(unbiased=True, server_memory=True, joint=True, down=False)

    share: Density = 0.1
    """of the numbers that are sent, in (0, 1]"""
    transform: Transform = "avg"
    """how like clients are held to be: avg (not known: safe), max (equal: worse than randk where they are not), opt (as they
    were in the round before), one (not at all: randk)"""
    bits: Width = 32
    """of each number that is sent, 2 to 32, as in randk"""

    def start(self, clients: int, size: int) -> dict[str, float]:
        """Begin with vectors that are not alike."""
        return {"ratio": 0.0}

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write numbers at random positions."""
        square = {"square": number(float(x.double() @ x.double()))} if self.transform == "opt" else {}
        return {**written(x, frame, self.share, self.bits), **square}, None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Decode one reply alone, as randk does."""
        self._square(parts)
        return spread(sent(parts, frame, self.share, self.bits) / self.share, frame, self.share)

    def survey(self, memory: Any, arrived: Mapping[int, Arrived]) -> Cohort:
        """Count who holds and who sent each number."""
        size = next(iter(arrived.values())).support.layout.trainable
        return surveyed(arrived, size, self.share, self.transform, memory["ratio"])

    def estimate(self, reply: Arrived, memory: Any, cohort: Cohort) -> Tensor:
        """Weight what a client sent by who else sent it."""
        frame = reply.frame
        weights = torch.from_numpy(cohort.factors[reply.support.places[frame.positions(self.share)]])
        return spread(sent(reply.parts, frame, self.share, self.bits) * weights, frame, self.share)

    def learn(self, reply: Arrived, memory: Any, cohort: Cohort) -> Any:
        """Add to the sums that R2 / R1 is estimated from."""
        if self.transform != "opt":
            return memory
        values = sent(reply.parts, reply.frame, self.share, self.bits).double()
        summed = memory["summed"].clone() if "summed" in memory else torch.zeros(reply.support.layout.trainable).double()
        summed[torch.from_numpy(reply.support.places[reply.frame.positions(self.share)])] += values
        squares = memory.get("squares", 0.0) + float(values @ values)
        return memory | {"summed": summed, "squares": squares, "r1": memory.get("r1", 0.0) + self._square(reply.parts)}

    def finish(self, memory: Any) -> dict[str, float]:
        """Estimate R2 / R1: R2 by (squares of sums - sums of squares) / share^2."""
        if not memory.get("r1"):
            return {"ratio": memory["ratio"]}
        together = float(memory["summed"] @ memory["summed"])
        return {"ratio": (together - memory["squares"]) / self.share**2 / memory["r1"]}

    def nominal_bits(self, frame: Frame) -> float:
        """Return k b + 64, and 64 for the square."""
        return self.bits * self.share * frame.n + 64 + 64 * (self.transform == "opt")

    def _square(self, parts: Parts) -> float:
        if self.transform != "opt":
            return 0.0
        found = float(parts.message.number(f"{parts.name}_square"))
        if found < 0:
            raise WireError(Reason.RANGE, 0, f"the squared vector is {found}")
        return found


def surveyed(arrived: Mapping[int, Arrived], size: int, share: float, kind: Transform, ratio: float) -> Cohort:
    """Return what the positions of a cohort say; `size`: trained numbers of the model."""
    holders, sent_by = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    for reply in arrived.values():
        holders[reply.support.places] += 1
        sent_by[reply.support.places[reply.frame.positions(share)]] += 1
    return Cohort(factors(kind, share, holders, sent_by, ratio))
