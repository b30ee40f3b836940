"""Saliency of each maskable weight: larger = keep. A score is a vector of shape (layout.maskable,)."""

from __future__ import annotations

from torch import Tensor

from fedsieve.params import Params


def magnitude(params: Params) -> Tensor:
    """Score a weight by its absolute value."""
    return params.maskable.abs()
