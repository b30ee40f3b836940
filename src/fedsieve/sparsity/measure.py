"""How masks and signs compare: between rounds, and between clients."""

from __future__ import annotations

import torch

from fedsieve.params import Layout, Masks, Params


def overlap(one: Masks, other: Masks) -> float:
    """Return the weights that both keep over those that either keeps (Jaccard), in [0, 1]; 1 if neither keeps any."""
    either = Masks(one.layout, one.kept | other.kept).count
    return (one & other).count / either if either else 1.0


def sign_flips(before: Params, after: Params, masks: Masks) -> float:
    """Return the share of the kept weights whose sign is another than before, in [0, 1]; 0 counts as positive."""
    if not masks.count:
        return 0.0
    flipped = (before.maskable >= 0) != (after.maskable >= 0)
    return float(flipped[masks.kept].float().mean())


class Agreement:
    """Mean overlap of the masks of several clients, added one at a time."""

    def __init__(self, layout: Layout) -> None:
        self._votes, self._voters = torch.zeros(layout.maskable, dtype=torch.int64), 0

    def add(self, masks: Masks) -> None:
        """Add one client's masks."""
        self._votes += masks.kept
        self._voters += 1

    def value(self) -> float | None:
        """Return what two clients both keep over what either keeps, each summed over all pairs; None for fewer than two."""
        n, v = self._voters, self._votes
        if n < 2:
            return None
        neither = (n - v) * (n - v - 1)
        either = int((n * (n - 1) - neither).sum())
        return int((v * (v - 1)).sum()) / either if either else 1.0
