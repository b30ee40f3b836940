"""Random masks with learned probabilities over frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsieve.streams import Stream


@dataclass(frozen=True, slots=True, eq=False)
class BernoulliMask:
    """Effective weights are `weights` where a coin falls that shows 1 with probability sigmoid(what is learned), else 0.

    A coin is thrown anew at each step. Its derivative is taken to be that of its probability, times that probability
    (Isik et al. 2023, arXiv 2209.15328, as their code has it).
    """

    weights: Tensor
    """frozen, shape (maskable,)"""
    penalty: float = 0.0
    """times the sum of the probabilities is added to the loss, so that masks become sparser"""
    coins: torch.Generator | None = None

    def bound(self, bring: Callable[[Tensor], Tensor], stream: Stream) -> BernoulliMask:
        """See `Reparam`."""
        weights = bring(self.weights)
        return replace(self, weights=weights, coins=torch.Generator(weights.device).manual_seed(stream.word()))

    def effective(self, latent: Tensor) -> Tensor:
        """See `Reparam`; only where `bound` was called."""
        return self.weights * torch.bernoulli(latent.sigmoid(), generator=self.coins)

    def backward(self, latent: Tensor, gradient: Tensor) -> None:
        """See `Reparam`."""
        p = latent.sigmoid()
        gradient.mul_(self.weights).mul_(p)
        if self.penalty:
            gradient.add_(self.penalty)
        gradient.mul_(p * (1 - p))

    def settle(self, latent: Tensor) -> None:
        """See `Reparam`."""
