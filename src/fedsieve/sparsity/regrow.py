"""Masks of constant density that move: drop some kept weights of each slot, grow as many pruned ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from fedsieve.params import Masks
from fedsieve.sparsity.select import select_by_slot, top
from fedsieve.streams import Stream


def regrow(masks: Masks, drop: Tensor, grow: Tensor, counts: Mapping[str, int], *, ties: Stream, again: bool = False) -> Masks:
    """Drop the lowest kept weights of each slot and grow as many of the highest pruned ones.

    With random scores for `grow` this is SET (Mocanu et al. 2018), with absolute gradients RigL (Evci et al. 2020, arXiv
    1911.11134). Every slot keeps as many weights as before. Whoever holds the weights sets the grown ones to 0.

    Args:
        masks: what is kept.
        drop: scores of shape (maskable,), larger = keep.
        grow: scores of shape (maskable,), larger = grow.
        counts: weights that each slot exchanges; fewer where it has not so many kept, or pruned. Slots not named stay.
        ties: decides between equal scores.
        again: a weight may be grown that was dropped just now.
    """
    kept = masks.kept.numpy().copy()
    dropping, growing = drop.numpy(), grow.numpy()
    for slot in masks.layout.masked_slots:
        begin, end = masks.layout.spans[slot.name]
        alive, pruned = (begin + np.flatnonzero(kept[begin:end] == which) for which in (True, False))
        count = min(counts.get(slot.name, 0), len(alive), len(pruned))
        if not count:
            continue
        stays = alive[top(dropping[alive], len(alive) - count, ties)]
        kept[alive] = False
        kept[stays] = True
        offered = begin + np.flatnonzero(~kept[begin:end]) if again else pruned
        kept[offered[top(growing[offered], count, ties)]] = True
    return Masks(masks.layout, torch.from_numpy(kept))


def exchanges(masks: Masks, share: float, names: Iterable[str] | None = None) -> dict[str, int]:
    """Return how many weights slots exchange: floor(share * kept), no more than are pruned; without those that exchange none.

    Args:
        masks: what is kept.
        share: of the kept weights, in [0, 1].
        names: of the slots; default: all.
    """
    kept = masks.counts()
    wanted = {
        name: min(int(share * kept[name]), masks[name].numel() - kept[name]) for name in (kept if names is None else names)
    }
    return {name: count for name, count in wanted.items() if count}


def lowered(masks: Masks, scores: Tensor, counts: Mapping[str, int], ties: Stream) -> Masks:
    """Drop the `counts[name]` lowest scores, shape (maskable,), of the kept weights of each slot."""
    keep = {name: count - counts.get(name, 0) for name, count in masks.counts().items()}
    return select_by_slot(scores, keep, within=masks, ties=ties)
