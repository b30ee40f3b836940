"""Means and votes over replies, one at a time: memory does not grow with the cohort.

Sums are taken in float64 in the order given (the engine gives ascending client ids), so a mean does not depend on which
client answered first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsieve.params import Layout, Masks, Params

TOGETHER = 4
"""clients that are added in one pass over the sum"""
PIECE = 2**14
"""elements of the sum that stay in the processor's cache during a pass"""


class WeightedMean:
    """Running sum(weight * params) / sum(weight)."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sum = torch.zeros(layout.size, dtype=torch.float64)
        self._pieces = torch.split(self._sum, PIECE)
        self._waiting: list[tuple[Tensor, float]] = []
        self.weight = 0.0

    def add(self, params: Params, weight: float) -> None:
        """Add one client's parameters with a weight > 0. They are read until the fourth client after it at the latest."""
        self._waiting.append((params.flat, weight))
        self.weight += weight
        if len(self._waiting) == TOGETHER:
            self._add_waiting()

    def value(self) -> Params:
        """Return the mean of what was added; at least one must have been."""
        self._add_waiting()
        return Params(self._layout, (self._sum / self.weight).float())

    def _add_waiting(self) -> None:
        """Add who waits, piece by piece: each element of the sum still takes the clients in their order."""
        flats = [torch.split(flat, PIECE) for flat, _ in self._waiting]
        for index, piece in enumerate(self._pieces):
            for flat, (_, weight) in zip(flats, self._waiting, strict=True):
                piece.add_(flat[index], alpha=weight)
        self._waiting.clear()


class Votes:
    """How many clients keep each maskable weight."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._votes = torch.zeros(layout.maskable, dtype=torch.int32)
        self.voters = 0

    def add(self, masks: Masks) -> None:
        """Add one client's vote."""
        self._votes += masks.kept
        self.voters += 1

    def at_least(self, votes: int) -> Masks:
        """Keep what has so many votes or more, and at least one."""
        return Masks(self._layout, self._votes >= max(1, votes))
