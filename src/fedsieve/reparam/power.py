"""Powerpropagation: weights are signed powers of what is learned (Schwarz et al. 2021, arXiv 2110.00296)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedsieve.streams import Stream


@dataclass(frozen=True, slots=True)
class Power:
    """Effective weights are v |v|^(alpha - 1), so what is large learns faster (equation 2); alpha = 1 changes nothing."""

    alpha: float
    """>= 1"""

    def bound(self, bring: Callable[[Tensor], Tensor], stream: Stream) -> Power:
        """See `Reparam`."""
        return self

    def effective(self, latent: Tensor) -> Tensor:
        """See `Reparam`."""
        return latent * latent.abs().pow_(self.alpha - 1)

    def latent(self, effective: Tensor) -> Tensor:
        """Return what is to be learned for the network to start with these weights: sign(w) |w|^(1 / alpha).

        In double precision, since a float32 power rounds 1 / alpha too: the weights would come back up to 8 ulp away, not 2.
        """
        wide = effective.double()
        return (wide.sign() * wide.abs().pow_(1 / self.alpha)).to(effective.dtype)

    def backward(self, latent: Tensor, gradient: Tensor) -> None:
        """See `Reparam`: the derivative is alpha |v|^(alpha - 1)."""
        gradient.mul_(latent.abs().pow_(self.alpha - 1).mul_(self.alpha))

    def settle(self, latent: Tensor) -> None:
        """See `Reparam`."""
