"""Masks by a threshold over frozen weights, with learned scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsieve.streams import Stream


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdMask:
    """Effective weights are `weights` where what is learned is at least `threshold`, else 0; straight-through backwards.

    With `penalty` > 0 the gradient of a score gets `penalty` more, so that masks become sparser.
    """

    weights: Tensor
    """frozen, shape (maskable,)"""
    threshold: float = 0.0
    penalty: Tensor | None = None
    """added to the gradients of the scores, shape (maskable,)"""

    def bound(self, bring: Callable[[Tensor], Tensor], stream: Stream) -> ThresholdMask:
        """See `Reparam`."""
        return replace(self, weights=bring(self.weights), penalty=None if self.penalty is None else bring(self.penalty))

    def effective(self, latent: Tensor) -> Tensor:
        """See `Reparam`."""
        return torch.where(latent >= self.threshold, self.weights, 0)

    def backward(self, latent: Tensor, gradient: Tensor) -> None:
        """See `Reparam`."""
        gradient.mul_(self.weights)
        if self.penalty is not None:
            gradient.add_(self.penalty)

    def settle(self, latent: Tensor) -> None:
        """See `Reparam`."""
