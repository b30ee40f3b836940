"""From scores to masks that keep exactly as many weights as asked: unstructured, n of m, or whole channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.errors import UsageError
from fedsieve.params import Layout, Masks
from fedsieve.streams import Stream


def select(scores: Tensor, keep: int, *, within: Masks, ties: Stream) -> Masks:
    """Keep the `keep` highest scores among the weights that `within` keeps (all of them if `keep` is more).

    Exact: min(keep, within.count) weights are kept, also where scores are equal; among equal scores at the threshold the
    stream draws. O(n) by partition.

    Args:
        scores: shape (layout.maskable,), finite.
        keep: number of weights, >= 0.
        within: only these may be kept.
        ties: decides between equal scores.
    """
    kept = np.zeros(within.layout.maskable, dtype=bool)
    alive = np.flatnonzero(within.kept.numpy())
    kept[alive[top(scores.numpy()[alive], keep, ties)]] = True
    return Masks(within.layout, torch.from_numpy(kept))


def select_by_slot(scores: Tensor, keep: Mapping[str, int], *, within: Masks, ties: Stream) -> Masks:
    """Keep the highest scores of each maskable slot separately: `keep[name]` of slot `name`, as `select` does."""
    layout: Layout = within.layout
    kept = np.zeros(layout.maskable, dtype=bool)
    for slot in layout.masked_slots:
        begin, end = layout.spans[slot.name]
        alive = begin + np.flatnonzero(within.kept[begin:end].numpy())
        kept[alive[top(scores.numpy()[alive], keep[slot.name], ties)]] = True
    return Masks(layout, torch.from_numpy(kept))


def guarded(scores: Tensor, keep: int, *, within: Masks, ties: Stream, floor: int) -> tuple[Masks, tuple[str, ...]]:
    """Select as `select` does, but leave no slot with fewer than `floor` weights, so that no layer is cut off.

    A slot that would keep fewer keeps its highest `floor` scores (or all it has within); the lowest scores of slots that have
    more than that give way, so the count is exact.

    Returns:
        The masks, and the names of the slots that were helped.

    Raises:
        UsageError: `keep` is less than the floors add up to.
    """
    masks = select(scores, keep, within=within, ties=ties)
    layout, found = within.layout, masks.counts()
    least = {name: min(floor, count) for name, count in within.counts().items()}
    short = {name for name, count in found.items() if count < least[name]}
    if not short:
        return masks, ()
    if keep < sum(least.values()):
        raise UsageError(f"{keep} weights are to be kept, but {floor} in each of {len(found)} tensors are asked for at least.")
    base = select_by_slot(scores, least, within=within, ties=ties)
    free = Masks(layout, within.kept & ~base.kept)
    rest = select(scores, keep - base.count, within=free, ties=ties)
    return Masks(layout, base.kept | rest.kept), tuple(sorted(short))


def at_floor(masks: Masks, floor: int) -> tuple[str, ...]:
    """Say of each slot that keeps no more than `floor` of its weights that it does: the guard may have held them."""
    return tuple(
        f"{name} keeps {count} of {masks.layout.named[name].numel} weights, as few as the guard allows"
        for name, count in masks.counts().items()
        if count <= floor and count < masks.layout.named[name].numel
    )


def narrowed(
    score: Callable[[Masks], Tensor], keep: int, *, within: Masks, steps: int, ties: Stream, floor: int = 0
) -> tuple[Masks, tuple[str, ...]]:
    """Prune in steps of equal factors and score anew before each: after step k of n, (keep / count)**(k / n) of them are left.

    Source: SynFlow, Tanaka et al. 2020, arXiv 2006.05467, algorithm 1. One step is one-shot pruning.

    Returns:
        The masks, and the names of the slots that were helped to keep `floor` weights.
    """
    masks, helped, count = within, set[str](), within.count
    for step in range(1, steps + 1):
        left = keep if step == steps else max(keep, round(count * (keep / max(1, count)) ** (step / steps)))
        masks, names = guarded(score(masks), left, within=masks, ties=ties, floor=floor)
        helped.update(names)
    return masks, tuple(sorted(helped))


def narrowed_by_slot(
    score: Callable[[Masks], Tensor], keep: Mapping[str, int], *, within: Masks, steps: int, ties: Stream
) -> Masks:
    """Prune each slot separately to `keep[name]` weights, in steps of equal factors with scores anew, as `narrowed` does."""
    masks, counts = within, {name: int(within[name].sum()) for name in keep}
    for step in range(1, steps + 1):
        left = {n: max(keep[n], round(counts[n] * (keep[n] / max(1, counts[n])) ** (step / steps))) for n in keep}
        masks = select_by_slot(score(masks), keep if step == steps else left, within=masks, ties=ties)
    return masks


def select_n_of_m(scores: Tensor, n: int, m: int, *, layout: Layout, ties: Stream) -> Masks:
    """Keep the n highest of every m scores that follow one another in the inputs of an output unit.

    Where the inputs of a unit are no multiple of m, the last group keeps the same share, rounded up.
    """
    kept = np.zeros(layout.maskable, dtype=bool)
    for slot in layout.masked_slots:
        begin, end = layout.spans[slot.name]
        rows = scores[begin:end].numpy().reshape(slot.shape[0], -1)
        chosen = np.zeros(rows.shape, dtype=bool)
        noise = ties.permutation(rows.size).reshape(rows.shape)
        for first in range(0, rows.shape[1], m):
            group = rows[:, first : first + m]
            order = np.lexsort((noise[:, first : first + m], -group), axis=1)[:, : -(-n * group.shape[1] // m)]
            np.put_along_axis(chosen[:, first : first + m], order, True, axis=1)
        kept[begin:end] = chosen.ravel()
    return Masks(layout, torch.from_numpy(kept))


def select_channels(scores: Tensor, keep: Mapping[str, int], *, layout: Layout, ties: Stream) -> Masks:
    """Keep whole output channels of each slot, those with the highest mean scores.

    A channel is the weights of one output unit. As many are kept as `keep[name]` weights make, rounded down, one at least.
    """
    kept = np.zeros(layout.maskable, dtype=bool)
    for slot in layout.masked_slots:
        begin, end = layout.spans[slot.name]
        rows = scores[begin:end].numpy().reshape(slot.shape[0], -1)
        chosen = np.zeros(rows.shape, dtype=bool)
        chosen[top(rows.mean(axis=1), max(1, keep[slot.name] // rows.shape[1]), ties)] = True
        kept[begin:end] = chosen.ravel()
    return Masks(layout, torch.from_numpy(kept))


def top(scores: NDArray[np.floating[Any]], keep: int, ties: Stream) -> NDArray[np.int64]:
    """Positions of the `keep` highest scores, in no particular order."""
    if keep >= len(scores):
        return np.arange(len(scores))
    if keep <= 0:
        return np.arange(0)
    threshold = np.partition(scores, len(scores) - keep)[len(scores) - keep]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)
    missing = keep - len(above)
    if missing < len(equal):
        equal = equal[ties.permutation(len(equal))[:missing]]
    return np.concatenate([above, equal])
