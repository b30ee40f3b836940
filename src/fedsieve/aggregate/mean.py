"""Means and votes over replies, one at a time: memory does not grow with the cohort.

Sums are taken in float64 in the order given (the engine gives ascending client ids), so a mean does not depend on which
client answered first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsieve.params import Layout, Masks, Params


class WeightedMean:
    """Running sum(weight * params) / sum(weight)."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sum = torch.zeros(layout.size, dtype=torch.float64)
        self.weight = 0.0

    def add(self, params: Params, weight: float) -> None:
        """Add one client's parameters with a weight > 0."""
        self._sum.add_(params.flat, alpha=weight)
        self.weight += weight

    def value(self) -> Params:
        """Return the mean of what was added; at least one must have been."""
        return Params(self._layout, (self._sum / self.weight).float())


class HeldMean:
    """Running mean over those who hold each weight: sum(weight * m * w) / sum(weight * m). All hold what is not maskable."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sum = torch.zeros(layout.size, dtype=torch.float64)
        self._held = torch.zeros(layout.size, dtype=torch.float64)
        self.weight = 0.0

    def add(self, params: Params, masks: Masks, weight: float) -> None:
        """Add one client's parameters with a weight > 0."""
        flat, n = params.under(masks).flat, masks.layout.maskable
        self._sum.add_(flat, alpha=weight)
        self._held[:n].add_(masks.kept, alpha=weight)
        self._held[n:].add_(weight)
        self.weight += weight

    @property
    def holders(self) -> Masks:
        """What at least one client keeps."""
        return Masks(self._layout, self._held[: self._layout.maskable] > 0)

    def value(self, old: Params) -> Params:
        """Return the means, and `old` where nobody holds a weight."""
        mean = torch.where(self._held > 0, self._sum / self._held, old.flat.double())
        return Params(old.layout, mean.float())


class StatisticsMean:
    """Running mean of the statistics of some models, shape (models, size - trainable).

    Args:
        layout: of the models.
        pooled: BatchNorm's variances become those of all clients' numbers together, E(v + m^2) - (E m)^2, in place of E v.
    """

    def __init__(self, layout: Layout, *, pooled: bool = False) -> None:
        first, self._pairs = layout.trainable, list[tuple[slice, slice]]()
        for name, (begin, end) in layout.spans.items():
            mean = layout.spans.get(name.removesuffix("running_var") + "running_mean")
            if pooled and name.endswith("running_var") and mean is not None:
                self._pairs.append((slice(begin - first, end - first), slice(mean[0] - first, mean[1] - first)))
        self._sum = torch.zeros((), dtype=torch.float64)
        self.weight = 0.0

    def add(self, statistics: Tensor, weight: float) -> None:
        """Add one client's with a weight > 0."""
        found = statistics.double().clone()
        for variance, mean in self._pairs:
            found[:, variance] += found[:, mean] ** 2
        self._sum = self._sum + weight * found
        self.weight += weight

    def value(self) -> Tensor:
        """Return the mean, float32; at least one client's must have been added."""
        found = self._sum / self.weight
        for variance, mean in self._pairs:
            found[:, variance] -= found[:, mean] ** 2
        return found.float()


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


class SignVotes:
    """Running weighted mean of votes of +1 or -1."""

    BELOW = 0.5 - 2**-25
    """largest share of +1 that makes -1, in float32"""

    def __init__(self, n: int) -> None:
        self._sum = torch.zeros(n, dtype=torch.float64)
        self.weight = 0.0

    def add(self, signs: Tensor, weight: float) -> None:
        """Add one client's signs, +1 and -1 of shape (n,), with a weight > 0."""
        self._sum.add_(signs.double(), alpha=weight)
        self.weight += weight

    def value(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return what most voted, True for +1, and the share of +1, float32, which never says otherwise; one vote at least.

        Where votes are equal the sign is as `before`, bool of shape (n,), and the share is 1/2 or the number below.
        """
        signs = torch.where(self._sum == 0, before, self._sum > 0)
        share = ((self._sum / self.weight + 1) / 2).float()
        return signs, torch.where(signs, share.clamp(min=0.5), share.clamp(max=self.BELOW))
