"""AdaQuantFL: more levels as the loss falls (Jhunjhunwala, Gadhikar, Joshi and Eldar 2021, arXiv 2102.04487).

QSGD with s levels, the same for all clients of a round, which the server tells them: s = s_0 sqrt(F_0 / F), rounded up, with
F_0 the training loss of the first round and F that of the rounds since.

    down  the number of levels, 8 bytes
    sent  as qsgd

Deviates: F is the mean of the clients' losses while they trained, which they send anyway, smoothed from round to round
(`smoothing`); the source takes the loss of the model before that, over all clients. Rounding up is as in a public
implementation; the source's rule for learning rates that decay is not known to us. Norms are of buckets: with one for a whole
model of a million numbers, levels this few say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedsieve.compress import qsgd
from fedsieve.compress.base import Arrived, Caps, Compressor, Frame, Parts, Written
from fedsieve.settings import CountOrZero, Share, settings
from fedsieve.wire.bits import Reason, WireError


@settings
class AdaQuantFl(Compressor):
    """Round to levels that the server chooses by the loss, right on average."""

    caps: ClassVar[Caps] = Caps(unbiased=True, server_memory=True, down=False)

    first: qsgd.Levels = 2
    """levels above 0 in the first round, s_0, 1 to 2047"""
    most: qsgd.Levels = 255
    """levels above 0 that are never exceeded, 1 to 2047"""
    smoothing: Share = 0.9
    """weight of the loss so far in the running mean, in [0, 1) (0: the last round alone)"""
    norm: Literal["l2", "max"] = "l2"
    """what levels are shares of: the Euclidean norm of the bucket, or its largest magnitude"""
    bucket: CountOrZero = 512
    """numbers that share a norm, >= 0 (0: each tensor has one)"""

    def start(self, clients: int, size: int) -> dict[str, float]:
        """Begin with s_0."""
        return {"levels": min(self.first, self.most)}

    def announce(self, memory: Any, cohort: Sequence[int]) -> Mapping[int, Mapping[str, int | float]]:
        """Tell all the same number of levels."""
        said = {"levels": int(memory["levels"])}
        return dict.fromkeys(cohort, said)

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write levels and norms."""
        return qsgd.quantised(x, frame, told(frame, self.most), self.norm, self.bucket), None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read levels and norms."""
        return qsgd.restored(parts, frame, told(frame, self.most), self.bucket)

    def learn(self, reply: Arrived, memory: Any, cohort: Any) -> Any:
        """Add a client's loss to the mean of the round."""
        return heard(reply, memory)

    def finish(self, memory: Any) -> dict[str, float]:
        """Choose the levels of the next round; they stay where there is no loss above 0 to go by."""
        loss, kept = smoothed(memory, self.smoothing)
        if loss > 0:
            kept["start"] = kept.get("start", loss)
            kept["levels"] = max(1, min(self.most, ceil(self.first * sqrt(kept["start"] / loss) - 1e-9)))
        return kept

    def nominal_bits(self, frame: Frame) -> float:
        """Return the bits of level, sign and norm without an entropy code."""
        return qsgd.nominal(frame, told(frame, self.most), self.bucket)


def told(frame: Frame, most: int) -> int:
    """Return the levels that the server announced. WireError: MISSING or RANGE."""
    levels = frame.told.get("levels")
    if levels is None:
        raise WireError(Reason.MISSING, 0, "the server has not said how many levels there are")
    if not isinstance(levels, int) or not 1 <= levels <= most:
        raise WireError(Reason.RANGE, 0, f"the server says {levels} levels, not 1 to {most}")
    return levels


def heard(reply: Arrived, memory: Any) -> Any:
    """Add a client's loss, by its examples, to those of the round."""
    if reply.frame.loss is None:
        return memory
    total, weight = memory.get("total", 0.0), memory.get("weight", 0.0)
    return memory | {"total": total + reply.examples * reply.frame.loss, "weight": weight + reply.examples}


def smoothed(memory: Any, smoothing: float) -> tuple[float, dict[str, Any]]:
    """Return the running mean of the loss, 0 if there is none yet, and the memory without what was of this round."""
    kept = {name: value for name, value in memory.items() if name not in ("total", "weight")}
    if memory.get("weight"):
        last = memory["total"] / memory["weight"]
        kept["loss"] = smoothing * kept.get("loss", last) + (1 - smoothing) * last
    return float(kept.get("loss", 0.0)), kept
