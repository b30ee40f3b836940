"""Server optimisers: the mean update of the clients as a pseudo-gradient.

Sources: Reddi et al. 2021, "Adaptive federated optimization" (arXiv 2003.00295, algorithm 2) for Adagrad, Adam and Yogi;
Hsu et al. 2019 (arXiv 1909.06335) for momentum. As in the former there is no bias correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsieve.params import Params
from fedsieve.settings import NonNegative, Positive, Share, settings


@settings
class ServerOptim:
    """How the server applies the mean update of a round."""

    name: Literal["sgd", "momentum", "adagrad", "adam", "yogi"] = "sgd"
    """rule: sgd (with lr 1 plain averaging), momentum, adagrad, adam, yogi"""
    lr: Positive = 1.0
    """server learning rate, > 0"""
    momentum: Share = 0.9
    """decay of the first moment, in [0, 1) (all but sgd)"""
    second: Share = 0.99
    """decay of the second moment, in [0, 1) (adam and yogi)"""
    eps: NonNegative = 1e-3
    """added to the root of the second moment, >= 0 (adagrad, adam, yogi)"""


@dataclass(frozen=True, slots=True)
class Moments:
    """State of a server optimiser: first and second moments, shape (layout.trainable,), empty where the rule has none."""

    first: Tensor
    second: Tensor

    @classmethod
    def start(cls, optim: ServerOptim, size: int) -> Moments:
        """Zero moments; the second starts at eps**2, as the source recommends."""
        first = torch.zeros(size if optim.name != "sgd" else 0)
        adaptive = optim.name in ("adagrad", "adam", "yogi")
        return cls(first, torch.full((size if adaptive else 0,), optim.eps**2))


def step(optim: ServerOptim, params: Params, update: Params, moments: Moments) -> tuple[Params, Moments]:
    """Apply the mean update (new minus old) of a round; statistics are simply averaged, whatever the rule.

    With delta the update, b1 and b2 the decays:

        sgd       w += lr delta
        momentum  m = b1 m + delta;  w += lr m
        adaptive  m = b1 m + (1 - b1) delta;  w += lr m / (sqrt(v) + eps)
                  adagrad v += delta^2;  adam v = b2 v + (1 - b2) delta^2;  yogi v -= (1 - b2) delta^2 sign(v - delta^2)
    """
    delta, flat, v = update.trainable, params.flat + update.flat, moments.second
    if optim.name == "sgd":
        moved, first = delta, moments.first
    elif optim.name == "momentum":
        moved = first = optim.momentum * moments.first + delta
    else:
        first, square = optim.momentum * moments.first + (1 - optim.momentum) * delta, delta * delta
        if optim.name == "adagrad":
            v = v + square
        elif optim.name == "adam":
            v = optim.second * v + (1 - optim.second) * square
        else:
            v = v - (1 - optim.second) * square * torch.sign(v - square)
        moved = first / (v.sqrt() + optim.eps)
    flat[: params.layout.trainable] = params.trainable + optim.lr * moved
    return Params(params.layout, flat), Moments(first, v)
