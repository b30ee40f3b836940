"""Synaptic flow: what a network passes on of an input of ones, if all its weights are positive. No data are needed.

Source: Tanaka et al. 2020, arXiv 2006.05467, equation 2.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from fedsieve.models.spec import NORMS, ModelSpec
from fedsieve.params import Kind, Masks, Params


class Flow:
    """Scores the weights of a network: |w dR/dw|, R the sum of the outputs on an input of ones with |w| for every w.

    In float64, since products over many layers leave the range of float32. Normalisation is passed over, dropout is off and
    biases are 0: with them the flow through a layer would not equal that through the next. So for a chain of layers the scores
    of each layer add up to R, and those into a hidden unit to those out of it.

    Args:
        spec: the network; its module is copied.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._layout = spec.layout
        self._module = _without_norms(deepcopy(spec.module)).double().eval()
        shape = spec.example.shape
        if not spec.example.is_floating_point():
            raise TypeError("an input of ones needs a network that reads numbers, not tokens")
        self._ones = torch.ones(shape, dtype=torch.float64)
        self._owned = dict(self._module.named_parameters())

    def __call__(self, params: Params, masks: Masks) -> Tensor:
        """Return the scores under the masks, float64 of shape (maskable,), >= 0; 0 where pruned."""
        weights = params.under(masks)
        with torch.no_grad():
            for name, parameter in self._owned.items():
                slot = self._layout.named.get(name)
                if slot is not None and slot.kind is Kind.WEIGHT:
                    parameter.copy_(weights[name].abs())
                else:
                    parameter.zero_()
        owned = {slot.name: self._owned[slot.name] for slot in self._layout.masked_slots if slot.name in self._owned}
        gradients = torch.autograd.grad(self._module(self._ones).sum(), list(owned.values()), materialize_grads=True)
        scores = torch.zeros(self._layout.maskable, dtype=torch.float64)
        for (name, weight), gradient in zip(owned.items(), gradients, strict=True):
            scores[slice(*self._layout.spans[name])] = (gradient * weight.detach()).flatten()
        return scores.abs_()


def _without_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, NORMS):
        return nn.Identity()
    for name, child in module.named_children():
        setattr(module, name, _without_norms(child))
    return module
