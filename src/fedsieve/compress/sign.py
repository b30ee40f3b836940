"""Signs: one bit a number, by the vote of the majority or each client's own (Bernstein et al. 2018, arXiv 1802.04434).

    sent  a bit for each number, and 32 bits a tensor: its mean magnitude

With vote = majority every number of the mean becomes the sign that most clients sent, by number of examples, times the mean of
their magnitudes. With vote = own each client's signs count with its own magnitudes, and what that leaves over is remembered
(Karimireddy et al. 2019, arXiv 1901.09847).

Deviates: zeros count as +1. The magnitude of a vote is the clients' mean; the source leaves it to the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedsieve.compress.base import Arrived, Caps, Compressor, Frame, Parts, Written
from fedsieve.settings import settings
from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.sections import integers, vector


@settings
class Sign(Compressor):
    """Send a sign for each number, and remember the rest."""

    caps: ClassVar[Caps] = Caps(client_memory=True, joint=True)

    vote: Literal["own", "majority"] = "own"
    """whose signs count: each client's own, with its magnitudes, or those of the majority, with the mean of all magnitudes"""
    feedback: bool = True
    """with vote = own, remember what signs leave over; without, it is lost"""

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, Tensor | None]:
        """Write signs and mean magnitudes."""
        total = x if memory is None else x + memory
        means = torch.stack([part.abs().double().mean().float() for part in frame.split(total)])
        signs = (total >= 0).int() * 2 - 1
        left = total - signs * means.repeat_interleave(torch.tensor(frame.sizes))
        kept = left if self.feedback and self.vote == "own" else None
        return {"signs": integers(signs), "scales": vector(means)}, kept

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read signs and mean magnitudes."""
        means = parts.floats("scales", len(frame.sizes))
        if bool((means < 0).any()):
            raise WireError(Reason.RANGE, 0, "a magnitude is below 0")
        signs = parts.integers("signs", frame.n, -1, 1)
        if not bool(signs.all()):
            raise WireError(Reason.RANGE, 0, "a sign is 0")
        return signs * means.repeat_interleave(torch.tensor(frame.sizes))

    def survey(self, memory: Any, arrived: Mapping[int, Arrived]) -> Tensor | None:
        """Count the votes: the sign of each trained number of the model times the mean magnitude."""
        if self.vote == "own":
            return None
        size = next(iter(arrived.values())).support.layout.trainable
        votes, magnitudes, weights = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
        for reply in arrived.values():
            decoded, places = self.decode(reply.parts, reply.frame).double(), torch.from_numpy(reply.support.places)
            votes[places] += reply.examples * torch.where(decoded.signbit(), -1.0, 1.0)
            magnitudes[places] += reply.examples * decoded.abs()
            weights[places] += reply.examples
        return (torch.where(votes < 0, -1.0, 1.0) * magnitudes / weights.clamp(min=1e-300)).float()

    def estimate(self, reply: Arrived, memory: Any, cohort: Tensor | None) -> Tensor:
        """Return the signs of a client, or of the majority for all clients alike."""
        return self.decode(reply.parts, reply.frame) if cohort is None else reply.support.take(cohort)

    def nominal_bits(self, frame: Frame) -> float:
        """Return d + 32 for each tensor."""
        return frame.n + 32.0 * len(frame.sizes)
