"""How many weights each slot keeps."""

from __future__ import annotations

import numpy as np

from fedsieve.params import Layout


def uniform(layout: Layout, keep: int) -> dict[str, int]:
    """Keep the same share of every maskable slot; the counts add up to `keep` exactly (largest remainders, then order)."""
    slots = layout.masked_slots
    exact = np.array([slot.numel for slot in slots]) * (keep / max(1, layout.maskable))
    counts = np.floor(exact).astype(np.int64)
    for index in np.argsort(counts - exact, kind="stable")[: keep - int(counts.sum())]:
        counts[index] += 1
    return {slot.name: int(count) for slot, count in zip(slots, counts, strict=True)}
