"""SGD on flat vectors, and the learning rate over the rounds."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import Tensor

from fedsieve.settings import Local


def rate(local: Local, round: int, rounds: int) -> float:
    """Learning rate of a round in 1..rounds."""
    if local.schedule == "cosine":
        return local.lr * 0.5 * (1.0 + cos(pi * (round - 1) / rounds))
    if local.schedule == "exponential":
        return local.lr * local.decay ** (round - 1)
    return local.lr


class Sgd:
    """A client's optimiser over the flat trainable vector, or that of several with a row each, in place.

        g = gradient + weight_decay * w + proximal * (w - anchor), zero where pruned;  v = momentum * v + g
        w -= lr * (g + momentum * v if nesterov else v)

    The rule is that of Sutskever et al. 2013 in the form common to deep-learning libraries (v starts at the first gradient).
    With a mask, weights and momentum that start on the support stay on it exactly, after every step. Without momentum, weight
    decay and proximal term each tensor moves by its own gradient, without a pass through the flat one: bit for bit the same.

    Args:
        local: momentum, nesterov, weight_decay.
        lr: learning rate.
        weights: shape (..., trainable), and its views, one a tensor; views are for `step` only.
        gradient: shape (..., trainable), and its views; working memory.
        velocity: shape (..., trainable); None without momentum.
        support: shape (maskable,), 0.0 or 1.0, and its views, one a maskable tensor; None without a mask.
        proximal: weight of (1/2)||w - anchor||^2 (FedProx: Li et al. 2020, arXiv 1812.06127, equation 2).
    """

    def __init__(
        self,
        local: Local,
        lr: float,
        weights: tuple[Tensor, list[Tensor]],
        gradient: tuple[Tensor, list[Tensor]],
        velocity: Tensor | None,
        support: tuple[Tensor, list[Tensor]] | None,
        proximal: float,
    ) -> None:
        self._local, self._lr, self._proximal, self._velocity = local, lr, proximal, velocity
        (self._weights, self._weight_views), (self._gradient, self._gradient_views) = weights, gradient
        self._support, self._support_views = support or (self._gradient[..., :0], [])
        self._anchor = self._weights.clone() if proximal else None
        self._plain = velocity is None and not proximal and not local.weight_decay
        self.direct = lr if self._plain else 0.0
        """learning rate at which a layer may move its weights itself, before `move`; 0: it writes its gradients down"""

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        """Move the weights by one step along the gradients of the tensors, in the order of the views."""
        if self._plain:
            if self._support_views:  # maskable tensors come first
                torch._foreach_mul_(gradients[: len(self._support_views)], self._support_views)
            torch._foreach_add_(self._weight_views, gradients, alpha=-self._lr)
            return
        torch._foreach_copy_(self._gradient_views, gradients)
        self.move()

    @torch.no_grad()
    def move(self) -> None:
        """Move the weights by one step along the flat gradient; if `direct`, they have moved already, but for the mask."""
        weights, gradient = self._weights, self._gradient
        support = self._support.shape[-1]
        if self._plain:
            if support:
                weights[..., :support].mul_(self._support)
            return
        if self._local.weight_decay:
            gradient.add_(weights, alpha=self._local.weight_decay)
        if self._anchor is not None:
            gradient.add_(weights, alpha=self._proximal).sub_(self._anchor, alpha=self._proximal)
        if support:
            gradient[..., :support].mul_(self._support)
        if self._velocity is None:
            weights.add_(gradient, alpha=-self._lr)
            return
        self._velocity.mul_(self._local.momentum).add_(gradient)
        if self._local.nesterov:
            weights.add_(gradient, alpha=-self._lr).add_(self._velocity, alpha=-self._lr * self._local.momentum)
        else:
            weights.add_(self._velocity, alpha=-self._lr)
