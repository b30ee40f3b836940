"""From scores to masks that keep exactly as many weights as asked."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    kept[alive[_top(scores.numpy()[alive], keep, ties)]] = True
    return Masks(within.layout, torch.from_numpy(kept))


def select_by_slot(scores: Tensor, keep: dict[str, int], *, within: Masks, ties: Stream) -> Masks:
    """Keep the highest scores of each maskable slot separately: `keep[name]` of slot `name`, as `select` does."""
    layout: Layout = within.layout
    kept = np.zeros(layout.maskable, dtype=bool)
    for slot in layout.masked_slots:
        begin, end = layout.spans[slot.name]
        alive = begin + np.flatnonzero(within.kept[begin:end].numpy())
        kept[alive[_top(scores.numpy()[alive], keep[slot.name], ties)]] = True
    return Masks(layout, torch.from_numpy(kept))


def _top(scores: NDArray[np.float32], keep: int, ties: Stream) -> NDArray[np.int64]:
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
