"""Rand-k-Temporal: Rand-k of what changed since a client last sent each number (Jhunjhunwala et al. 2021, arXiv 2110.07751).

    sent  as randk: a client need not know what the server remembers

The server remembers, of each client, the last value that it saw of each number, b. A reply is decoded as b + (x - b) / share
where x was sent, b elsewhere: right on average for any b, with squared error (1 / share - 1) times (x - b)^2. With `transform`
the differences x - b are decoded together, as Rand-k-Spatial decodes x.

Deviates: where b is further from what was sent than zero is, it has grown stale, and is forgotten for that client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedsieve.compress.base import Arrived, Caps, Compressor, Frame, Parts, Written
from fedsieve.compress.randk import Width, sent, spread, written
from fedsieve.compress.randk_spatial import Cohort, surveyed
from fedsieve.errors import UsageError
from fedsieve.settings import Density, Positive, settings


@settings
class RandKTemporal(Compressor):
    """Send random numbers, and add what is known of the others from earlier rounds."""

    caps: ClassVar[Caps] = Caps(unbiased=True, server_memory=True, joint=True, down=False)

    share: Density = 0.1
    """of the numbers that are sent, in (0, 1]"""
    transform: Literal["one", "avg", "max"] = "one"
    """how like the clients' differences are held to be, as in randk_spatial: one (not at all), avg (not known), max (equal)"""
    bits: Width = 32
    """of each number that is sent, 2 to 32, as in randk"""
    memory_mb: Positive = 1024.0
    """megabytes that the server may remember, > 0: clients times trained numbers times 4 bytes must be less"""
    forget: bool = True
    """forget what is remembered of a client where zero would have been nearer to what it sent"""

    def start(self, clients: int, size: int) -> dict[str, Any]:
        """Begin with no memory of anybody."""
        return roomy(clients, size, self.memory_mb, "randk_spatial, which remembers nothing of clients")

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, None]:
        """Write numbers at random positions."""
        return written(x, frame, self.share, self.bits), None

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Decode a reply without memory, as randk does."""
        return spread(sent(parts, frame, self.share, self.bits) / self.share, frame, self.share)

    def survey(self, memory: Any, arrived: Mapping[int, Arrived]) -> Cohort:
        """Count who holds and who sent each number."""
        size = next(iter(arrived.values())).support.layout.trainable
        return surveyed(arrived, size, self.share, self.transform, 0.0)

    def estimate(self, reply: Arrived, memory: Any, cohort: Cohort) -> Tensor:
        """Add the weighted differences of what a client sent to what is remembered of it."""
        frame, seen = reply.frame, self._seen(reply, memory)
        at = frame.positions(self.share)
        values = sent(reply.parts, frame, self.share, self.bits) - seen[torch.from_numpy(at)]
        return seen + spread(values * torch.from_numpy(cohort.factors[reply.support.places[at]]), frame, self.share)

    def learn(self, reply: Arrived, memory: Any, cohort: Cohort) -> Any:
        """Remember what a client sent."""
        at, seen = torch.from_numpy(reply.frame.positions(self.share)), self._seen(reply, memory).clone()
        values = sent(reply.parts, reply.frame, self.share, self.bits)
        if self.forget and float((values - seen[at]).square().sum()) > float(values.square().sum()):
            seen.zero_()
        seen[at] = values
        return remembered(memory, reply, seen)

    def nominal_bits(self, frame: Frame) -> float:
        """Return k b + 64."""
        return self.bits * self.share * frame.n + 64

    def _seen(self, reply: Arrived, memory: Any) -> Tensor:
        found = recalled(memory, reply)
        return torch.zeros(reply.frame.n) if found is None else found


def recalled(memory: Any, reply: Arrived) -> Tensor | None:
    """Return what is remembered of a client for the numbers that it sends now, zero where it never sent any."""
    found = memory["seen"].get(reply.client, {}).get(reply.frame.name)
    return None if found is None else reply.support.take(found)


def remembered(memory: Any, reply: Arrived, x: Tensor) -> dict[str, Any]:
    """Return a memory that holds x of a client."""
    own = {**memory["seen"].get(reply.client, {}), reply.frame.name: reply.support.put(x)}
    return {"seen": {**memory["seen"], reply.client: own}}


def roomy(clients: int, size: int, memory_mb: float, instead: str) -> dict[str, Any]:
    """Return a memory of nobody. UsageError if that of all clients might be larger than allowed."""
    if (needed := clients * size * 4 / 1e6) > memory_mb:
        raise UsageError(
            f"compress.up.memory_mb = {memory_mb:g}: to remember {size} numbers of each of {clients} clients takes"
            f" {needed:.0f} MB.\nAllow more, or use {instead}."
        )
    return {"seen": {}}
