"""Random weights that nobody trains: both ends draw them from a seed, and what is learned is a mask over them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from fedsieve.errors import UsageError
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Kind, Layout, Masks, Params
from fedsieve.streams import Streams
from fedsieve.wire.message import Message
from fedsieve.wire.sections import Section, vector
from fedsieve.wire.shares import read_floats

Magnitudes = Literal["kaiming", "constant"]
Others = Literal["none", "biases", "norms", "all"]


def frozen(spec: ModelSpec, seed: int, magnitudes: Magnitudes = "kaiming", gain: float = sqrt(2)) -> Params:
    """Return weights drawn from a seed, equal to the bit on every platform; biases are 0, normalisation is the identity.

    Args:
        spec: the network.
        seed: names the draws.
        magnitudes: as drawn (kaiming), or gain / sqrt(fan_in) with the signs that were drawn (constant). With the gain of
            sqrt(2) either has the same mean square.
        gain: of the constants.
    """
    params = spec.initial("kaiming", Streams(seed))
    if magnitudes == "constant":
        for slot in spec.layout.masked_slots:
            params[slot.name].sign_().mul_(gain / sqrt(prod(slot.shape[1:])))
    return params


def bounds(layout: Layout) -> Tensor:
    """Return Xavier's bound sqrt(6 / (fan_in + fan_out)) of each maskable weight, float32 of shape (maskable,)."""
    fans = [(slot, prod(slot.shape[2:]) * sum(slot.shape[:2])) for slot in layout.masked_slots]
    return torch.cat([torch.full((slot.numel,), sqrt(6 / fan)) for slot, fan in fans])


def scores(layout: Layout, seed: int, bound: Tensor, *, positive: bool = False) -> Tensor:
    """Return a number from U(-bound, bound) for each maskable weight, or its magnitude: the same at both ends.

    float32 of shape (maskable,).
    """
    drawn = torch.from_numpy(Streams(seed)("scores").uniform(layout.maskable))
    drawn = (bound.double() * (2 * drawn - 1)).float()
    return drawn.abs() if positive else drawn


def evened(weights: Params, masks: Masks) -> Tensor:
    """Return for each maskable weight 1 over the mean magnitude of the kept ones of its tensor; shape (maskable,)."""
    parts = []
    for slot in masks.layout.masked_slots:
        kept = weights[slot.name][masks[slot.name]].abs()
        parts.append(torch.full((slot.numel,), 1 / float(kept.mean()) if kept.any() else 1.0))
    return torch.cat(parts)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What is learned of a masked network: signs of frozen weights, and ordinary numbers."""

    signed: Masks
    """weights that have a sign"""
    ordinary: Tensor
    """numbers trained as such, bool of shape (layout.trainable,)"""

    @classmethod
    def of(cls, masks: Masks, others: Others, *, head: bool = False) -> Parts:
        """Split a network.

        Args:
            masks: weights that are kept.
            others: what no mask covers and is an ordinary number: nothing, biases, normalisation, or all.
            head: whether the weights of the last maskable slot are ordinary numbers too.
        """
        layout, kinds = masks.layout, {"none": (), "biases": (Kind.BIAS,), "norms": (Kind.NORM,), "all": tuple(Kind)}[others]
        free, last = torch.zeros(layout.size, dtype=torch.bool), layout.masked_slots[-1]
        for slot in layout.slots:
            free[slice(*layout.spans[slot.name])] = (head and slot is last) or (not slot.maskable and slot.kind in kinds)
        return cls(Masks(layout, masks.kept & ~free[: layout.maskable]), free[: layout.trainable])

    @property
    def learned(self) -> Tensor:
        """All of it, bool of shape (layout.trainable,)."""
        learned = self.ordinary.clone()
        learned[: len(self.signed.kept)] |= self.signed.kept
        return learned

    def section(self, params: Params) -> dict[str, Section]:
        """Write the ordinary numbers, if there are any."""
        numbers = params.trainable[self.ordinary]
        return {"numbers": vector(numbers)} if len(numbers) else {}

    def read(self, message: Message) -> Tensor:
        """Read them, float32 of shape (ordinary numbers,). WireError: COUNT."""
        n = int(self.ordinary.sum())
        return read_floats(message, "numbers", n) if n else torch.zeros(0)


def check(spec: ModelSpec) -> None:
    """Refuse a network in which not only weights would have to be random.

    Raises:
        UsageError: nothing is maskable, or biases or normalisation are; or statistics are kept, which no mask tells.
    """
    slots = spec.layout.masked_slots
    if not slots:
        raise UsageError("the model has no maskable weight: see model.maskable and model.dense.")
    if other := next((slot.name for slot in slots if slot.kind is not Kind.WEIGHT), None):
        raise UsageError(
            f'masks are learned over random weights, but {other} starts as a constant. Set model.maskable = "weights".'
        )
    for name, layer in spec.module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None:
            raise UsageError(
                f"layer {name} of model {spec.name!r} keeps running statistics, which masks over frozen weights do not hold.\n"
                'Set model.norm = "group" or "none".'
            )
