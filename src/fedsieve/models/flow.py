"""Synaptic flow: what a network passes on of an input of ones, if all its weights are positive. No data are needed.

Source: Tanaka et al. 2020, arXiv 2006.05467, equation 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from fedsieve.errors import UsageError
from fedsieve.models.spec import NORMS, ModelSpec
from fedsieve.params import Kind, Layout, Masks, Params
from fedsieve.sparsity.allocate import allocate
from fedsieve.sparsity.select import narrowed, narrowed_by_slot
from fedsieve.streams import Stream


class Flow:
    """Scores the weights of a network: |w dR/dw|, R the sum of the outputs on an input of ones with |w| for every w.

    In float64, since products over many layers leave the range of float32. Normalisation is passed over, dropout is off and
    biases are 0: with them the flow through a layer would not equal that through the next. So for a chain of layers the scores
    of each layer add up to R, and those into a hidden unit to those out of it.

    Computed on one thread: sums that several threads share are rounded by their number, and another end may score anew.

    Args:
        spec: the network; its module is copied.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._layout = spec.layout
        self._module = _without_norms(deepcopy(spec.module)).double().eval()
        shape = spec.example.shape
        if not spec.example.is_floating_point():
            raise UsageError(f"model {spec.name!r} reads tokens: synaptic flow needs a network that reads numbers.")
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
        with one_thread():
            gradients = torch.autograd.grad(self._module(self._ones).sum(), list(owned.values()), materialize_grads=True)
        scores = torch.zeros(self._layout.maskable, dtype=torch.float64)
        for (name, weight), gradient in zip(owned.items(), gradients, strict=True):
            scores[slice(*self._layout.spans[name])] = (gradient * weight.detach()).flatten()
        return scores.abs_()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that results do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pruned(
    spec: ModelSpec,
    params: Params,
    keep: int,
    *,
    scope: Literal["global", "layer"],
    steps: int,
    floor: int,
    head: bool = False,
    ties: Stream,
) -> Masks:
    """Keep exactly `keep` weights by synaptic flow, scored anew before each of `steps` steps (algorithm 1).

    Args:
        spec: the network.
        params: its weights; only their magnitudes count.
        keep: weights that are kept in all.
        scope: rank over the whole network, or keep the same density in each slot.
        steps: of equal factors; 1 is one-shot pruning.
        floor: weights that each slot keeps at least.
        head: whether the last slot keeps all it has.
        ties: decides between equal scores.

    Raises:
        UsageError: `keep` is less than head and floors add up to.
    """
    layout, flow = spec.layout, Flow(spec)
    others = Layout.of(layout.masked_slots[: -1 if head else None])
    body = Masks(layout, torch.arange(layout.maskable) < others.maskable)
    left = keep - (layout.maskable - others.maskable)
    if left < 1:
        raise UsageError(
            f"a density of {keep / layout.maskable:.2g} keeps {keep} of {layout.maskable} weights, "
            f"of which {max(0, keep - left)} are the head's. Set a larger algorithm.density."
        )

    def score(masks: Masks) -> Tensor:
        return flow(params, Masks(layout, masks.kept | ~body.kept))

    if scope == "global":
        masks, _ = narrowed(score, left, within=body, steps=steps, ties=ties, floor=floor)
    else:
        counts = {slot.name: 0 for slot in layout.masked_slots} | allocate(others, left, floor=floor)
        masks = narrowed_by_slot(score, counts, within=body, steps=steps, ties=ties)
    return Masks(layout, masks.kept | ~body.kept)


def _without_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, NORMS):
        return nn.Identity()
    for name, child in module.named_children():
        setattr(module, name, _without_norms(child))
    return module
