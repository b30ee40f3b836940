"""Parameters of a model as named views of one flat vector, and masks over its maskable part.

The flat vector has three parts, in this order, which is also the order on the wire:

    [0, maskable)            weights that a mask may remove
    [maskable, trainable)    other trained tensors: biases, normalisation scales, weights kept dense
    [trainable, size)        statistics: floating-point buffers such as BatchNorm's running mean and variance

Each rule that treats the parts differently is therefore a slice: a mask is a vector over the first part, a server
optimiser works on the first two, and statistics are only averaged. Integer buffers (BatchNorm's counter of batches) are
not here: they never travel and start at zero in each client update.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from math import isfinite, prod

import torch
from torch import Tensor


class Kind(StrEnum):
    """What a slot is in its model."""

    WEIGHT = "weight"
    BIAS = "bias"
    NORM = "norm"
    BUFFER = "buffer"


@dataclass(frozen=True, slots=True)
class Slot:
    """One named tensor of a model."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    maskable: bool
    """may be pruned, and counts in density"""
    block: int
    """depth group from the input on, for staged and block-wise methods"""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The slots of a model in the order of the flat vector. Make one with `Layout.of`."""

    slots: tuple[Slot, ...]
    maskable: int = field(init=False)
    """number of elements that a mask covers"""
    trainable: int = field(init=False)
    """number of elements that training changes"""
    size: int = field(init=False)
    """number of elements of the flat vector"""
    spans: Mapping[str, tuple[int, int]] = field(init=False, repr=False, compare=False)
    """name -> (begin, end) in the flat vector"""
    named: Mapping[str, Slot] = field(init=False, repr=False, compare=False)
    """name -> slot"""
    fingerprint: bytes = field(init=False)
    """8 bytes that name this layout; a payload of another one is refused"""

    def __post_init__(self) -> None:
        spans, end, ends = {}, 0, [0, 0, 0]
        for slot in self.slots:
            part = _part(slot)
            if any(ends[part + 1 :]):
                raise ValueError(f"slot {slot.name!r} stands after a later part of the vector; build the layout with Layout.of")
            spans[slot.name] = (end, end + slot.numel)
            end += slot.numel
            ends[part] = end
        if len(spans) != len(self.slots):
            raise ValueError("two slots have the same name")
        text = json.dumps([[s.name, s.shape, s.kind.value, s.maskable, s.block] for s in self.slots], separators=(",", ":"))
        object.__setattr__(self, "maskable", ends[0])
        object.__setattr__(self, "trainable", max(ends[:2]))
        object.__setattr__(self, "size", end)
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "named", {slot.name: slot for slot in self.slots})
        object.__setattr__(self, "fingerprint", blake2b(text.encode(), digest_size=8).digest())

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> Layout:
        """Arrange slots, given in the model's own order, into the three parts; the order within a part is kept."""
        return cls(tuple(sorted(slots, key=_part)))

    @property
    def masked_slots(self) -> tuple[Slot, ...]:
        """The slots that a mask covers, in order."""
        return tuple(slot for slot in self.slots if slot.maskable)


def finite(flat: Tensor) -> bool:
    """Return whether all elements of a vector are finite, in less time than a copy takes.

    NaN and infinity survive in the squared norm; so does an overflow of finite numbers, which the slower test tells apart.
    """
    return isfinite(float(torch.dot(flat, flat))) or bool(torch.isfinite(flat).all())


def _part(slot: Slot) -> int:
    if slot.kind is Kind.BUFFER:
        return 2
    return 0 if slot.maskable else 1


@dataclass(frozen=True, slots=True, eq=False)
class Params(Mapping[str, Tensor]):
    """Named views of one contiguous float32 tensor `flat` of shape (..., layout.size)."""

    layout: Layout
    flat: Tensor

    def __post_init__(self) -> None:
        if self.flat.shape[-1] != self.layout.size:
            raise ValueError(f"flat has {self.flat.shape[-1]} elements, the layout {self.layout.size}")

    @classmethod
    def zeros(cls, layout: Layout) -> Params:
        """All zero, shape (layout.size,)."""
        return cls(layout, torch.zeros(layout.size))

    def __getitem__(self, name: str) -> Tensor:
        begin, end = self.layout.spans[name]
        return self.flat[..., begin:end].view(*self.flat.shape[:-1], *self.layout.named[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.spans)

    def __len__(self) -> int:
        return len(self.layout.slots)

    @property
    def maskable(self) -> Tensor:
        """View of the part that a mask covers, shape (..., layout.maskable)."""
        return self.flat[..., : self.layout.maskable]

    @property
    def dense(self) -> Tensor:
        """View of all that no mask covers, statistics included, shape (..., size - maskable)."""
        return self.flat[..., self.layout.maskable :]

    @property
    def trainable(self) -> Tensor:
        """View of what training changes, shape (..., layout.trainable)."""
        return self.flat[..., : self.layout.trainable]

    @property
    def statistics(self) -> Tensor:
        """View of the normalisation statistics, shape (..., size - trainable)."""
        return self.flat[..., self.layout.trainable :]

    def __sub__(self, other: Params) -> Params:
        return Params(self.layout, self.flat - other.flat)

    def __add__(self, other: Params) -> Params:
        return Params(self.layout, self.flat + other.flat)

    def under(self, masks: Masks) -> Params:
        """Return a copy that is zero where the masks are."""
        flat = self.flat.clone()
        flat[..., : self.layout.maskable].masked_fill_(~masks.kept, 0)
        return Params(self.layout, flat)


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Which maskable weights are kept: `kept` is bool of shape (layout.maskable,), True = kept."""

    layout: Layout
    kept: Tensor

    def __post_init__(self) -> None:
        if self.kept.shape != (self.layout.maskable,) or self.kept.dtype != torch.bool:
            raise ValueError(f"kept is {self.kept.dtype} {tuple(self.kept.shape)}, not bool ({self.layout.maskable},)")

    @classmethod
    def full(cls, layout: Layout) -> Masks:
        """Nothing pruned."""
        return cls(layout, torch.ones(layout.maskable, dtype=torch.bool))

    def __getitem__(self, name: str) -> Tensor:
        """View of one maskable slot's mask, in the slot's shape."""
        begin, end = self.layout.spans[name]
        return self.kept[begin:end].view(self.layout.named[name].shape)

    def __and__(self, other: Masks) -> Masks:
        return Masks(self.layout, self.kept & other.kept)

    def __le__(self, other: Masks) -> bool:
        """Whether every weight kept here is kept there."""
        return not bool((self.kept & ~other.kept).any())

    @property
    def count(self) -> int:
        """Number of weights kept."""
        return int(self.kept.sum())

    @property
    def density(self) -> float:
        """Kept over maskable, in [0, 1]; 1 for a model with nothing to mask."""
        return self.count / self.layout.maskable if self.layout.maskable else 1.0

    def counts(self) -> dict[str, int]:
        """Number of weights kept of each maskable slot by name."""
        return {slot.name: int(self[slot.name].sum()) for slot in self.layout.masked_slots}

    def densities(self) -> dict[str, float]:
        """Density of each maskable slot by name."""
        return {slot.name: float(self[slot.name].float().mean()) for slot in self.layout.masked_slots}
