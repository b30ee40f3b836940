"""SGD and Adam on flat vectors, and the learning rate over the rounds."""

from __future__ import annotations

from math import cos, isfinite, pi, sqrt

import torch
from torch import Tensor

from fedsieve.errors import Diverged
from fedsieve.reparam.base import Reparam
from fedsieve.settings import Local


def rate(local: Local, round: int, rounds: int) -> float:
    """Learning rate of a round in 1..rounds."""
    if local.schedule == "cosine":
        return local.lr * 0.5 * (1.0 + cos(pi * (round - 1) / rounds))
    if local.schedule == "exponential":
        return local.lr * local.decay ** (round - 1)
    return local.lr


def gradient_weight(local: Local, lr: float, steps: int, proximal: float = 0.0) -> float:
    """Total weight of the gradients in what `Sgd` does from zero velocity.

    It is the norm ||a||_1 of Wang et al. 2020 (arXiv 2007.07481): after the steps w = start - lr * sum_k a_k g_k, where g_k is
    the gradient of step k, drift and weight decay included.

        plain                  a_k = 1                                sum: steps
        momentum m             a_k = (1 - m**n) / (1 - m)             with n = steps - k + 1
        proximal, q = lr * mu  a_k = (1 - q)**(n - 1)                 sum: (1 - (1 - q)**steps) / q

    The a_k are what is left of a first gradient of 1 after 1, 2, ... steps.

    Raises:
        Diverged: the proximal term overshoots, lr * proximal being too large.
    """
    moved = velocity = total = 0.0
    for step in range(steps):
        gradient = (step == 0) - lr * proximal * moved
        velocity = local.momentum * velocity + gradient
        moved += gradient + local.momentum * velocity if local.nesterov else velocity
        total += abs(moved)
    if not isfinite(total):
        raise Diverged(f"the proximal term overshoots: lr {lr} times its weight {proximal} should be below 1")
    return total


BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's decay rates, and what is added to the root: as Kingma and Ba propose"""


class Sgd:
    """A client's optimiser over the flat trainable vector, or that of several with a row each, in place.

        g = gradient + drift + weight_decay * w + proximal * (w - anchor), zero where pruned or fixed
        v = momentum * v + g;  w -= lr * (g + momentum * v if nesterov else v)

    The rule is that of Sutskever et al. 2013 in the form common to deep-learning libraries (v starts at the first gradient).
    With a mask, weights and momentum that start on the support stay on it exactly, after every step. If nothing but gradient
    and mask counts, each tensor moves by its own gradient, without a pass through the flat one: bit for bit the same.

    With `adam` the last line is that of Kingma and Ba 2015 (arXiv 1412.6980, algorithm 1), from zero moments:

        m = b1 m + (1 - b1) g;  s = b2 s + (1 - b2) g^2;  w -= lr * moves * m / (1 - b1^t) / (sqrt(s / (1 - b2^t)) + 1e-8)

    With a reparametrisation w is what is learned; the network computes with `seen`, which `begin` makes of it before each step.

    Args:
        local: momentum, nesterov, weight_decay.
        lr: learning rate.
        weights: shape (..., trainable), and its views, one a tensor; views are for `step` only.
        gradient: shape (..., trainable), and its views; working memory.
        velocity: shape (..., trainable); None without momentum.
        support: shape (maskable,), 0.0 or 1.0, and its views, one a maskable tensor; None without a mask.
        proximal: weight of (1/2)||w - anchor||^2 (FedProx: Li et al. 2020, arXiv 1812.06127, equation 2).
        drift: added to each gradient, shape (trainable,); None: nothing.
        moves: factors of the learning rate, 1.0 where a weight is trained, 0.0 where it stays as it is, shape (trainable,);
            None: all are trained.
        reparam: the map, the vector that the network computes with, shape (trainable,), and how many of its first elements the
            map is for; None: the network computes with the weights themselves.
        adam: move by Adam's rule; momentum has no say then.
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
        drift: Tensor | None = None,
        moves: Tensor | None = None,
        reparam: tuple[Reparam, Tensor, int] | None = None,
        *,
        adam: bool = False,
    ) -> None:
        self._local, self._lr, self._proximal, self._velocity = local, lr, proximal, velocity
        (self._weights, self._weight_views), (self._gradient, self._gradient_views) = weights, gradient
        self._support, self._support_views = support or (self._gradient[..., :0], [])
        self._anchor = self._weights.clone() if proximal else None
        self._drift, self._moves, self._reparam = drift, moves, reparam
        self._moments = (torch.zeros_like(self._gradient), torch.zeros_like(self._gradient)) if adam else None
        self._steps = 0
        terms = (velocity, self._anchor, drift, moves, reparam, self._moments)
        self._plain = not local.weight_decay and all(term is None for term in terms)
        self.direct = lr if self._plain else 0.0
        """learning rate at which a layer may move its weights itself, before `move`; 0: it writes its gradients down"""

    def begin(self) -> None:
        """Show the network what it computes with; to be called before each step."""
        if self._reparam is None:
            return
        reparam, seen, n = self._reparam
        with torch.no_grad():
            seen[:n], seen[n:] = reparam.effective(self._weights[:n]), self._weights[n:]

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
        if self._reparam is not None:
            reparam, _, n = self._reparam
            reparam.backward(weights[:n], gradient[:n])
        if self._drift is not None:
            gradient.add_(self._drift)
        if self._local.weight_decay:
            gradient.add_(weights, alpha=self._local.weight_decay)
        if self._anchor is not None:
            gradient.add_(weights, alpha=self._proximal).sub_(self._anchor, alpha=self._proximal)
        if support:
            gradient[..., :support].mul_(self._support)
        if self._moves is not None:
            gradient.mul_(self._moves)
        self._along(gradient)
        if self._reparam is not None:
            reparam, _, n = self._reparam
            reparam.settle(weights[:n])

    def _along(self, gradient: Tensor) -> None:
        if self._moments is not None:
            (first, second), self._steps = self._moments, self._steps + 1
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            way = first / second.sqrt().div_(sqrt(1 - BETAS[1] ** self._steps)).add_(EPSILON)
            way = way if self._moves is None else way.mul_(self._moves)
            self._weights.add_(way, alpha=-self._lr / (1 - BETAS[0] ** self._steps))
        elif self._velocity is None:
            self._weights.add_(gradient, alpha=-self._lr)
        else:
            self._velocity.mul_(self._local.momentum).add_(gradient)
            if self._local.nesterov:
                self._weights.add_(gradient, alpha=-self._lr).add_(self._velocity, alpha=-self._lr * self._local.momentum)
            else:
                self._weights.add_(self._velocity, alpha=-self._lr)
