"""Saliency of each maskable weight: larger = keep. A score is a vector of shape (layout.maskable,).

What needs a gradient is handed one: `client.gradients` at a client, `fedsieve.models.flow` where no data are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsieve.params import Layout, Params
from fedsieve.streams import Stream


def magnitude(params: Params) -> Tensor:
    """Score a weight by its absolute value."""
    return params.maskable.abs()


def random(layout: Layout, stream: Stream) -> Tensor:
    """Score by chance: uniform in [0, 1), float64."""
    return torch.from_numpy(stream.uniform(layout.maskable))


def sensitivity(params: Params, gradient: Params) -> Tensor:
    """Score by what the loss changes if a weight is taken away, |g w| (SNIP: Lee et al. 2019, arXiv 1810.02340, equation 5)."""
    return (gradient.maskable * params.maskable).abs()


def flow(params: Params, curvature: Params) -> Tensor:
    """Score by what the gradient's norm loses if a weight is taken away, w (H g) (GraSP: Wang et al. 2020, arXiv 2002.07376).

    Args:
        params: the weights.
        curvature: H g, the Hessian of the loss times its gradient.
    """
    return curvature.maskable * params.maskable


def steepness(gradient: Params) -> Tensor:
    """Score by the absolute gradient: which pruned weights to grow (RigL: Evci et al. 2020, arXiv 1911.11134)."""
    return gradient.maskable.abs()


def movement(params: Params, gradient: Params) -> Tensor:
    """Score by whether a step takes a weight away from zero, -g w (Sanh et al. 2020, arXiv 2005.07683, section 3)."""
    return -gradient.maskable * params.maskable
