"""DAdaQuant: more levels when the loss stalls, and more for clients that weigh more (Hoenig et al. 2021, arXiv 2111.00465).

QSGD with q_i levels for client i. Over time: q starts small, and doubles when the running mean of the training loss has not
fallen for `patience` of the rounds. Over clients: q_i = sqrt(a / b) w_i^(2/3), a = sum w_j^(2/3), b = sum w_j^2 / q^2,
rounded, w_i the share of a client in the mean of its cohort: of all choices with the variance that q for all would have, this
has the fewest levels.

    down  the number of levels, 8 bytes; clients of equal levels get the same message
    sent  as qsgd

Deviates: a client's number of examples is known once it has answered; before that it counts as average. Losses are those of
training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.compress import qsgd
from fedsieve.compress.adaquantfl import heard, smoothed, told
from fedsieve.compress.base import Arrived, Caps, Compressor, Frame, Parts, Written
from fedsieve.settings import Count, CountOrZero, Share, settings


@settings
class DAdaQuant(Compressor):
    """Round to levels that the server chooses by loss and client, right on average."""

    caps: ClassVar[Caps] = Caps(unbiased=True, server_memory=True, down=False)

    first: qsgd.Levels = 1
    """levels above 0 in the first round, 1 to 2047"""
    most: qsgd.Levels = 255
    """levels above 0 that are never exceeded, 1 to 2047"""
    patience: Count = 4
    """rounds, >= 1, that the loss may stall, and that q stays after it doubled; the source has a tenth of all"""
    smoothing: Share = 0.9
    """weight of the loss so far in the running mean, in [0, 1)"""
    by_client: bool = True
    """give clients that weigh more more levels; without, all have q"""
    norm: Literal["l2", "max"] = "l2"
    """what levels are shares of: the Euclidean norm of the bucket, or its largest magnitude"""
    bucket: CountOrZero = 512
    """numbers that share a norm, >= 0 (0: each tensor has one)"""

    def start(self, clients: int, size: int) -> dict[str, Any]:
        """Begin with the first q."""
        return {"levels": min(self.first, self.most), "examples": {}, "losses": []}

    def announce(self, memory: Any, cohort: Sequence[int]) -> Mapping[int, Mapping[str, int | float]]:
        """Tell each client its levels."""
        q, known = int(memory["levels"]), memory["examples"]
        if not self.by_client:
            return {client: {"levels": q} for client in cohort}
        usual = float(np.mean(list(known.values()))) if known else 1.0
        weights = np.array([known.get(client, usual) for client in cohort])
        chosen = np.clip(by_weight(weights / weights.sum(), q), 1, self.most)
        return {client: {"levels": int(levels)} for client, levels in zip(cohort, chosen, strict=True)}

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write levels and norms."""
        return qsgd.quantised(x, frame, told(frame, self.most), self.norm, self.bucket), None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read levels and norms."""
        return qsgd.restored(parts, frame, told(frame, self.most), self.bucket)

    def learn(self, reply: Arrived, memory: Any, cohort: Any) -> Any:
        """Add a client's loss, and note its number of examples."""
        return heard(reply, memory | {"examples": {**memory["examples"], reply.client: reply.examples}})

    def finish(self, memory: Any) -> dict[str, Any]:
        """Double q if the loss has stalled since it was last doubled."""
        loss, kept = smoothed(memory, self.smoothing)
        if loss > 0:
            losses = [*kept["losses"], loss]
            if len(losses) > self.patience and losses[-1] >= losses[-1 - self.patience]:
                kept["levels"], losses = min(self.most, 2 * int(kept["levels"])), []
            kept["losses"] = losses[-1 - self.patience :]
        return kept

    def nominal_bits(self, frame: Frame) -> float:
        """Return the bits of level, sign and norm without an entropy code."""
        return qsgd.nominal(frame, told(frame, self.most), self.bucket)


def by_weight(weights: NDArray[np.float64], q: int) -> NDArray[np.int64]:
    """Return the levels of clients with these shares, which sum to 1: as exact together as q for all, with fewer in total."""
    a, b = float(np.sum(weights ** (2 / 3))), float(np.sum(weights**2)) / q**2
    levels: NDArray[np.int64] = np.maximum(1, np.round((a / b) ** 0.5 * weights ** (2 / 3))).astype(np.int64)
    return levels
