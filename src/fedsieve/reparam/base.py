"""What a reparametrisation is: a map, element by element, from learned numbers to the weights a network computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fedsieve.params import Params
from fedsieve.streams import Stream


class Reparam(Protocol):
    """A map over the maskable weights; whatever else is trained is what it is.

    Implementations are frozen dataclasses whose tensors have shape (layout.maskable,).
    """

    def bound(self, bring: Callable[[Tensor], Tensor], stream: Stream) -> Reparam:
        """Return the map for local training.

        Args:
            bring: puts a vector of shape (maskable,) into the order in which training holds the weights.
            stream: of random numbers, if the map draws some.
        """

    def effective(self, latent: Tensor) -> Tensor:
        """Return the weights that the network computes with, shape (maskable,); `latent` is what is learned."""

    def backward(self, latent: Tensor, gradient: Tensor) -> None:
        """Turn the gradient with respect to the effective weights into that with respect to `latent`, in place."""

    def settle(self, latent: Tensor) -> None:
        """Bring what is learned back into its range after a step, in place."""


def seen(learned: Params, reparam: Reparam) -> Params:
    """Return what the network computes with, given what was learned."""
    return Params(learned.layout, torch.cat([reparam.effective(learned.maskable), learned.dense]))
