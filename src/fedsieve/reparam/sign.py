"""Sign supermasks: frozen magnitudes, learned signs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedsieve.streams import Stream

Estimator = Literal["clipped", "identity", "tanh"]


@dataclass(frozen=True, slots=True, eq=False)
class SignMask:
    """Effective weights are `weights` times the sign of what is learned; the sign of 0 is +1.

    The sign's derivative is 0 almost everywhere; a straight-through estimator stands in for it (Bengio et al. 2013,
    arXiv 1308.3432): 1, or 1 within [-limit, limit] and 0 outside (clipped), or 1 - tanh(z)^2 (tanh).
    """

    weights: Tensor
    """frozen, shape (maskable,); 0 where pruned"""
    estimator: Estimator = "clipped"
    limit: float = 1.0
    """what is learned stays within [-limit, limit]; 0: no bound"""
    scale: Tensor | None = None
    """factors of the gradients, shape (maskable,)"""
    plain: Tensor | None = None
    """True where what is learned is the weight itself, bool of shape (maskable,)"""

    def bound(self, bring: Callable[[Tensor], Tensor], stream: Stream) -> SignMask:
        """See `Reparam`."""
        scale, plain = (None if vector is None else bring(vector.float()) for vector in (self.scale, self.plain))
        return replace(self, weights=bring(self.weights), scale=scale, plain=None if plain is None else plain > 0)

    def effective(self, latent: Tensor) -> Tensor:
        """See `Reparam`."""
        signed = torch.where(latent >= 0, self.weights, -self.weights)
        return signed if self.plain is None else torch.where(self.plain, latent, signed)

    def backward(self, latent: Tensor, gradient: Tensor) -> None:
        """See `Reparam`."""
        own = None if self.plain is None else gradient[self.plain]
        gradient.mul_(self.weights)
        if self.scale is not None:
            gradient.mul_(self.scale)
        if self.estimator == "tanh":
            gradient.mul_(1 - latent.tanh().square_())
        elif self.estimator == "clipped" and self.limit:
            gradient.mul_(latent.abs() <= self.limit)
        if own is not None:
            gradient[self.plain] = own

    def settle(self, latent: Tensor) -> None:
        """See `Reparam`."""
        if not self.limit:
            return
        own = None if self.plain is None else latent[self.plain]
        latent.clamp_(-self.limit, self.limit)
        if own is not None:
            latent[self.plain] = own
