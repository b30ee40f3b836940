"""How many weights each slot keeps, by a rule for the densities of the slots.

    uniform     the density asked for, in each slot
    erk, er     proportional to (sum of the dimensions) / (product of the dimensions); er leaves the kernel's out
    balanced    the same number of weights in each slot
    pyramidal   r, r^2, r^3, ... from the input on

A slot cannot keep more than it has. Exact counts share what is too much for one slot out among the others, so that
round(density * maskable) weights are kept, no more and no fewer. As the published codes have it (`paper`) it is lost: at a
density of 0.5 their networks keep 0.27 (balanced) or 0.39 (erk) of a ResNet-18.

Sources: Mocanu et al. 2018 (er); Evci et al. 2020, arXiv 1911.11134 (erk, iterative); Gadhikar et al. 2023, arXiv 2210.02412
(balanced, pyramidal, and what their code does).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsieve.errors import UsageError
from fedsieve.params import Layout, Slot

Rule = Literal["uniform", "erk", "er", "balanced", "pyramidal"]
_Reals = NDArray[np.float64]


def allocate(
    layout: Layout,
    keep: int,
    rule: Rule = "uniform",
    *,
    paper: bool = False,
    floor: int = 0,
    factors: Sequence[float] | None = None,
) -> dict[str, int]:
    """Return how many weights each maskable slot keeps.

    Args:
        layout: the slots.
        keep: weights that are kept in all.
        rule: see the module.
        paper: as the published codes have it, where surplus is lost: the sum may be less than `keep`.
        floor: weights that a slot keeps at least, or all it has; not with `paper`.
        factors: one a slot, > 0, by which the rule's densities are multiplied before they are brought back to `keep`.

    Raises:
        UsageError: `keep` is less than the floors add up to.
    """
    sizes = _sizes(layout)
    if not len(sizes):
        return {}
    share = min(1.0, keep / int(sizes.sum()))
    wanted = densities(layout, share, rule, paper=paper)
    if factors is not None:
        wanted = _filled(wanted * np.asarray(factors, dtype=np.float64), sizes, share)
    wanted = wanted * sizes
    counts = np.rint(wanted).astype(np.int64) if paper else _exact(wanted, sizes, keep, floor)
    return {slot.name: int(count) for slot, count in zip(layout.masked_slots, counts, strict=True)}


def uniform(layout: Layout, keep: int) -> dict[str, int]:
    """Keep the same share of every maskable slot; the counts add up to `keep` exactly (largest remainders, then order)."""
    return allocate(layout, keep)


def densities(layout: Layout, density: float, rule: Rule, *, paper: bool = False) -> _Reals:
    """Return the density of each maskable slot, in [0, 1], in the order of the layout."""
    sizes = _sizes(layout)
    if rule == "uniform":
        return np.full(len(sizes), density)
    if rule == "pyramidal":
        return _pyramidal(sizes, density)
    ratios = np.ones(len(sizes)) / sizes if rule == "balanced" else np.array([_ratio(s, rule) for s in layout.masked_slots])
    if paper:
        clipped: _Reals = np.minimum(1.0, density * sizes.sum() / (ratios * sizes).sum() * ratios)
        return clipped
    return _filled(ratios, sizes, density)


def _ratio(slot: Slot, rule: Rule) -> float:
    dimensions = slot.shape[:2] if rule == "er" else slot.shape
    return sum(dimensions) / prod(dimensions)


def _filled(ratios: _Reals, sizes: _Reals, density: float) -> _Reals:
    """Densities proportional to `ratios`, at most 1, whose mean over the weights is `density`."""
    full = np.zeros(len(sizes), dtype=bool)
    while not full.all():
        factor = max(0.0, density * sizes.sum() - sizes[full].sum()) / (ratios * sizes)[~full].sum()
        over = ~full & (factor * ratios > 1)
        if not over.any():
            return np.where(full, 1.0, factor * ratios)
        full |= over
    return np.ones(len(sizes))


def _pyramidal(sizes: _Reals, density: float) -> _Reals:
    """Powers of the r in (0, 1] for which the mean over the weights is `density`, found by bisection."""
    powers = np.arange(1, len(sizes) + 1)
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        below = (middle**powers * sizes).sum() < density * sizes.sum()
        low, high = (middle, high) if below else (low, middle)
    return np.asarray(high**powers, dtype=np.float64)


def _exact(wanted: _Reals, sizes: _Reals, keep: int, floor: int) -> NDArray[np.int64]:
    """Whole numbers near `wanted` that add up to `keep`, none above its size or below the floor."""
    most = sizes.astype(np.int64)
    least = np.minimum(floor, most)
    keep = min(keep, int(most.sum()))
    if keep < least.sum():
        raise UsageError(f"{keep} weights are to be kept, but {len(sizes)} tensors with {floor} each make {least.sum()}.")
    counts = np.clip(np.floor(wanted + 1e-9).astype(np.int64), least, most)
    by_remainder = np.argsort(np.floor(wanted + 1e-9) - wanted, kind="stable")
    while missing := keep - int(counts.sum()):
        room = by_remainder[(counts < most if missing > 0 else counts > least)[by_remainder]]
        for place in room[: abs(missing)]:
            counts[place] += 1 if missing > 0 else -1
    return counts


def _sizes(layout: Layout) -> _Reals:
    return np.array([slot.numel for slot in layout.masked_slots], dtype=np.float64)
