"""Sections: one value each, encoded. The functions named after a value write it, `read_*` read and check it.

What the reader already knows is not sent: names, shapes and sizes come from the layout, the positions of values and signs
from the masks.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.params import Layout, Masks, Params, finite
from fedsieve.wire.bits import (
    Bits,
    Coding,
    Reason,
    WireError,
    decode_integers,
    decode_mask,
    encode_integers,
    encode_mask,
    pack_bits,
    put_varints,
    take_varints,
    unpack_bits,
)

Precision = Literal["fp32", "fp16", "bf16"]

INTEGERS = 1 << 16
"""a section may hold this many entropy-coded integers more than the layout has parameters"""


class Codec(IntEnum):
    """What a section holds and how; the high four bits are the family."""

    DENSE_FP32 = 0x10
    DENSE_FP16 = 0x11
    DENSE_BF16 = 0x12
    VALUES_FP32 = 0x20
    VALUES_FP16 = 0x21
    VALUES_BF16 = 0x22
    MASK_BITMAP = 0x30
    MASK_WHOLE = 0x31
    MASK_SLOTS = 0x32
    WITHIN_BITMAP = 0x38
    WITHIN_WHOLE = 0x39
    WITHIN_SLOTS = 0x3A
    INDICES_BITMAP = 0x40
    INDICES_WHOLE = 0x41
    INDICES_SLOTS = 0x42
    INDICES_PACKED = 0x43
    SIGNS_BITMAP = 0x50
    SIGNS_WHOLE = 0x51
    SIGNS_SLOTS = 0x52
    INTEGERS_PACKED = 0x60
    INTEGERS_CODED = 0x61
    SEED = 0x70
    INTEGER = 0x71
    REAL = 0x72
    VECTOR_FP32 = 0x78
    VECTOR_FP64 = 0x79
    VECTOR_FP16 = 0x7A
    VECTOR_BF16 = 0x7B


DENSE = {Codec.DENSE_FP32: torch.float32, Codec.DENSE_FP16: torch.float16, Codec.DENSE_BF16: torch.bfloat16}
VALUES = {Codec.VALUES_FP32: torch.float32, Codec.VALUES_FP16: torch.float16, Codec.VALUES_BF16: torch.bfloat16}
VECTOR = {
    Codec.VECTOR_FP32: torch.float32,
    Codec.VECTOR_FP64: torch.float64,
    Codec.VECTOR_FP16: torch.float16,
    Codec.VECTOR_BF16: torch.bfloat16,
}
MASK = {Codec.MASK_BITMAP: Coding.BITMAP, Codec.MASK_WHOLE: Coding.WHOLE, Codec.MASK_SLOTS: Coding.GROUPS}
WITHIN = {Codec.WITHIN_BITMAP: Coding.BITMAP, Codec.WITHIN_WHOLE: Coding.WHOLE, Codec.WITHIN_SLOTS: Coding.GROUPS}
INDICES = {Codec.INDICES_BITMAP: Coding.BITMAP, Codec.INDICES_WHOLE: Coding.WHOLE, Codec.INDICES_SLOTS: Coding.GROUPS}
SIGNS = {Codec.SIGNS_BITMAP: Coding.BITMAP, Codec.SIGNS_WHOLE: Coding.WHOLE, Codec.SIGNS_SLOTS: Coding.GROUPS}
_PRECISION: dict[Precision, int] = {"fp32": 0, "fp16": 1, "bf16": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Halved:
    """Numbers that become 16 bits each when they are packed, straight into the payload: one pass less over both."""

    flat: Tensor
    """float32 (n,)"""
    dtype: torch.dtype

    def __len__(self) -> int:
        """Return the number of bytes."""
        return 2 * self.flat.numel()

    def write(self, target: memoryview | bytearray) -> None:
        """Convert into `target`. WireError: NONFINITE."""
        if not len(self):
            return
        written = torch.frombuffer(target, dtype=self.dtype).copy_(self.flat)
        _refuse_nonfinite(written, self.flat)
        if sys.byteorder != "little":
            written.view(torch.int16).numpy().byteswap(inplace=True)

    def converted(self) -> bytearray:
        """Return the bytes. WireError: NONFINITE."""
        target = bytearray(len(self))
        self.write(target)
        return target


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """One encoded value."""

    codec: Codec
    body: bytes | memoryview | Halved
    """may be a view of the tensor that was encoded: leave that alone until the message is packed"""
    offset: int = 0
    """first byte of the body in the payload it came from"""
    source: tuple[Params, Masks | None] | None = None
    """the model that was written and the masks it was written under, for who may write it otherwise; None: it is no model"""

    @property
    def view(self) -> memoryview:
        """The body as bytes to read from."""
        return memoryview(self.body.converted() if isinstance(self.body, Halved) else self.body)


def dense(params: Params, precision: Precision = "fp32") -> Section:
    """Write all parameters, the statistics included: 4 bytes each, or 2 rounded to nearest even.

    The section is a view of the parameters until it is packed.

    Raises:
        WireError: NONFINITE; for fp16 (also of values of 65520 and more) and bf16 when the message is packed.
    """
    codec = Codec(Codec.DENSE_FP32 + _PRECISION[precision])
    return Section(codec, _floats(_vector(params), DENSE[codec]), source=(params, None))


def read_dense(section: Section, layout: Layout) -> Params:
    """Read what `dense` wrote. The result may be a view of the payload: treat it as read-only."""
    return Params(layout, _read_floats(section, layout.size, DENSE[section.codec]))


def values(params: Params, masks: Masks, precision: Precision = "fp32") -> Section:
    """Write the kept ones of the maskable parameters, then all others; the receiver knows the masks.

    Raises:
        WireError: NONFINITE, as in `dense`; values under a pruned position are not looked at.
    """
    codec = Codec(Codec.VALUES_FP32 + _PRECISION[precision])
    flat, kept = _vector(params).numpy(), _positions(masks)
    chosen = np.concatenate([flat[: masks.layout.maskable].take(kept), flat[masks.layout.maskable :]])
    return Section(codec, _floats(torch.from_numpy(chosen), VALUES[codec]), source=(params, masks))


def read_values(section: Section, masks: Masks) -> Params:
    """Read what `values` wrote; zero where pruned."""
    layout, kept = masks.layout, _positions(masks)
    sent = _read_floats(section, kept.size + layout.size - layout.maskable, VALUES[section.codec]).numpy()
    flat = np.zeros(layout.size, dtype=np.float32)
    flat[kept] = sent[: kept.size]
    flat[layout.maskable :] = sent[kept.size :]
    return Params(layout, torch.from_numpy(flat))


def mask(masks: Masks, within: Masks | None = None) -> Section:
    """Write masks as a bitmap, or entropy-coded with one count or one a slot: the smallest.

    Args:
        masks: what is kept.
        within: masks that the receiver has and that keep at least as much; only their kept positions are sent.
    """
    bits, groups, codec = _bits(masks), _sizes(masks.layout), Codec.MASK_BITMAP
    if within is not None:
        if within.layout.fingerprint != masks.layout.fingerprint or not masks <= within:
            raise ValueError("the masks keep a weight that `within` does not, or are of another layout")
        bits, groups, codec = bits.take(_positions(within)), _counts(within), Codec.WITHIN_BITMAP
    coding, body = encode_mask(bits, groups)
    return Section(Codec(codec + coding), body)


def read_mask(section: Section, layout: Layout, within: Masks | None = None) -> Masks:
    """Read what `mask` wrote; masks that were sent within others need the same ones here.

    Raises:
        WireError: SECTION without `within` where it is needed, RANGE for a complete mask that keeps more than `within`.
    """
    if section.codec in MASK:
        bits = decode_mask(MASK[section.codec], section.view, _sizes(layout), section.offset)
        masks = Masks(layout, torch.from_numpy(bits))
        if within is not None and not masks <= within:
            raise WireError(Reason.RANGE, section.offset, "the mask keeps a weight that was pruned before")
        return masks
    if within is None:
        raise WireError(Reason.SECTION, section.offset, "the mask is relative to an earlier one, which is not here")
    sent = decode_mask(WITHIN[section.codec], section.view, _counts(within), section.offset)
    bits = np.zeros(layout.maskable, dtype=np.bool_)
    bits[_positions(within)] = sent
    return Masks(layout, torch.from_numpy(bits))


def indices(positions: Tensor | NDArray[np.int64] | Sequence[int], within: Layout | Sequence[int]) -> Section:
    """Write positions, strictly ascending: as a mask, or packed as numbers, the smallest.

    Args:
        positions: in the maskable part of a layout, or in a vector of other tensors.
        within: that layout, or the sizes of those tensors.
    """
    sizes = _sizes(within)
    at, total = np.asarray(positions, dtype=np.int64), sum(sizes)
    if at.ndim != 1 or (at.size and (at[0] < 0 or at[-1] >= total or (np.diff(at) <= 0).any())):
        raise ValueError(f"indices must be strictly ascending and within [0, {total})")
    bits = np.zeros(total, dtype=np.bool_)
    bits[at] = True
    coding, body = encode_mask(bits, sizes)
    packed = put_varints([at.size]) + pack_bits(at, _index_width(total))
    if len(packed) < len(body):
        return Section(Codec.INDICES_PACKED, packed)
    return Section(Codec(Codec.INDICES_BITMAP + coding), body)


def read_indices(section: Section, within: Layout | Sequence[int]) -> Tensor:
    """Read what `indices` wrote within the same sizes, int64 of shape (k,).

    Raises:
        WireError: also ORDER and RANGE.
    """
    body, offset, sizes = section.view, section.offset, _sizes(within)
    if section.codec in INDICES:
        return torch.from_numpy(np.flatnonzero(decode_mask(INDICES[section.codec], body, sizes, offset)))
    (n,), at = take_varints(body, 1, offset=offset)
    if n > (total := sum(sizes)):
        raise WireError(Reason.COUNT, offset, f"{n} indices into {total} numbers")
    positions = unpack_bits(body[at:], n, _index_width(total), offset + at)
    if (np.diff(positions) <= 0).any():
        raise WireError(Reason.ORDER, offset + at, "indices are not strictly ascending")
    if n and positions[-1] >= total:
        raise WireError(Reason.RANGE, offset + at, f"index {positions[-1]} into {total} numbers")
    return torch.from_numpy(positions)


def signs(chosen: Tensor, masks: Masks | None = None) -> Section:
    """Write one sign per weight, entropy-coded where that is smaller than a bit each.

    Args:
        chosen: bool (True is +1), or numbers +1 and -1; of shape (kept,), or (maskable,) of which the kept ones are taken.
        masks: which weights are kept; without, one entropy code serves all of `chosen`.
    """
    if masks is not None and chosen.numel() == masks.layout.maskable:
        chosen = chosen.flatten()[masks.kept]
    if chosen.dtype != torch.bool and not bool((chosen.abs() == 1).all()):
        raise ValueError("signs must be +1 or -1")
    bits: Bits = (chosen if chosen.dtype == torch.bool else chosen > 0).detach().flatten().cpu().numpy()
    groups = [bits.size] if masks is None else _counts(masks)
    if bits.size != sum(groups):
        raise ValueError(f"{bits.size} signs for {sum(groups)} kept weights")
    coding, body = encode_mask(bits, groups)
    return Section(Codec(Codec.SIGNS_BITMAP + coding), body)


def read_signs(section: Section, masks: Masks) -> Tensor:
    """Read what `signs` wrote, int8 of +1 and -1, shape (kept,)."""
    bits = decode_mask(SIGNS[section.codec], section.view, _counts(masks), section.offset)
    return torch.from_numpy(bits.astype(np.int8) * np.int8(2) - np.int8(1))


def integers(numbers: Tensor | NDArray[np.integer] | Sequence[int], bits: int | None = None) -> Section:
    """Write whole numbers of 32 bits, flattened: entropy-coded by their histogram, or packed, the smaller.

    Args:
        numbers: in [-2**31, 2**31). A reader refuses more than `layout.size + INTEGERS` of them if they are entropy-coded.
        bits: width of each if they are to be packed, in 1..32 and enough for max - min.
    """
    array = np.asarray(numbers.detach().cpu() if isinstance(numbers, Tensor) else numbers)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"integers are of type {array.dtype}")
    coded, body = encode_integers(array.astype(np.int64).ravel(), bits)
    return Section(Codec(Codec.INTEGERS_PACKED + coded), body)


def read_integers(section: Section, layout: Layout) -> Tensor:
    """Read what `integers` wrote, int32 of shape (n,)."""
    coded = section.codec is Codec.INTEGERS_CODED
    return torch.from_numpy(decode_integers(coded, section.view, layout.size + INTEGERS, section.offset))


def seed(value: int) -> Section:
    """Write a seed in [0, 2**64): 8 bytes."""
    if not 0 <= value < 2**64:
        raise ValueError(f"seed {value} is not in [0, 2**64)")
    return Section(Codec.SEED, struct.pack("<Q", value))


def number(value: int | float) -> Section:
    """Write one number: a whole one of 64 bits with sign, or a float64 that is finite; 8 bytes."""
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{value} is not a number of 64 bits")
        return Section(Codec.INTEGER, struct.pack("<q", value))
    if not isfinite(value):
        raise WireError(Reason.NONFINITE, 0, f"a number is {value}")
    return Section(Codec.REAL, struct.pack("<d", value))


_SCALAR = {Codec.SEED: "<Q", Codec.INTEGER: "<q", Codec.REAL: "<d"}


def read_number(section: Section) -> int | float:
    """Read what `seed` or `number` wrote."""
    body = section.view
    if len(body) != 8:
        raise WireError(Reason.LENGTH, section.offset, f"{len(body)} bytes for a number of 8")
    value: int | float = struct.unpack(_SCALAR[section.codec], body)[0]
    if not isfinite(value):
        raise WireError(Reason.NONFINITE, section.offset, f"a number is {value}")
    return value


def vector(numbers: Tensor | Sequence[float]) -> Section:
    """Write numbers that are no model, such as metrics: 4 bytes each from a float32 tensor, 2 from one of 16 bits, else 8."""
    tensor = numbers.detach().cpu() if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.float64)
    codec = next((codec for codec, dtype in VECTOR.items() if dtype == tensor.dtype), None)
    if tensor.ndim != 1 or codec is None:
        raise ValueError(
            f"a vector is {tensor.dtype} of shape {tuple(tensor.shape)}, not bfloat16, float16, 32 or 64 of shape (n,)"
        )
    return Section(codec, _floats(tensor, VECTOR[codec]))


def read_vector(section: Section) -> Tensor:
    """Read what `vector` wrote, bfloat16, float16, float32 or float64 of shape (n,)."""
    dtype = VECTOR[section.codec]
    return _read_floats(section, len(section.body) // dtype.itemsize, dtype, keep=True)


def _vector(params: Params) -> Tensor:
    if params.flat.ndim != 1:
        raise ValueError(f"parameters of shape {tuple(params.flat.shape)}; a message holds those of one model")
    return params.flat.detach().to("cpu", torch.float32)


def _floats(flat: Tensor, dtype: torch.dtype) -> memoryview | Halved:
    """Return a vector as little-endian bytes, a view of it where no conversion is needed."""
    if dtype.itemsize == 2:
        return Halved(flat, dtype)
    raw = flat.contiguous().to(dtype)
    _refuse_nonfinite(raw, flat)
    array = raw.numpy()
    return (array if sys.byteorder == "little" else array.byteswap()).view(np.uint8).data


def _refuse_nonfinite(written: Tensor, flat: Tensor) -> None:
    if not _finite(written):
        where = int(written.isfinite().logical_not().nonzero()[0])
        raise WireError(Reason.NONFINITE, 0, f"element {where} is {float(flat[where])}, not finite as {written.dtype}")


def _finite(flat: Tensor) -> bool:
    """Return whether all elements are finite, in about the time of a copy or less."""
    if not flat.numel():
        return True
    if flat.dtype.itemsize > 2:
        return finite(flat)
    raw, infinity = flat.view(torch.int16).numpy(), 0x7C00 if flat.dtype == torch.float16 else 0x7F80
    return bool(raw.max() < infinity and raw.view(np.uint16).max() < infinity + 0x8000)


def _read_floats(section: Section, n: int, dtype: torch.dtype, *, keep: bool = False) -> Tensor:
    """Return n finite numbers as float32, or as they are if `keep`.

    Numbers that need no conversion are a view of the payload if it is writable (a bytearray, shared memory). `bytes` are
    copied, since a torch tensor cannot be read-only and writing to it would change an immutable object.
    """
    if len(section.body) != n * dtype.itemsize:
        raise WireError(Reason.LENGTH, section.offset, f"{len(section.body)} bytes for {n} numbers of {dtype.itemsize}")
    raw = np.frombuffer(section.view, dtype={2: "<i2", 4: "<f4", 8: "<f8"}[dtype.itemsize])
    if not (raw.flags.writeable and raw.flags.aligned and raw.dtype.isnative):
        raw = raw.astype(raw.dtype.newbyteorder("="))
    flat = torch.from_numpy(raw).view(dtype)
    if not _finite(flat):
        where = int(flat.isfinite().logical_not().nonzero()[0])
        raise WireError(Reason.NONFINITE, section.offset + where * dtype.itemsize, f"element {where} is {float(flat[where])}")
    return flat if keep else flat.to(torch.float32)


def _bits(masks: Masks) -> Bits:
    bits: Bits = masks.kept.cpu().contiguous().numpy()
    return bits


def _positions(masks: Masks) -> NDArray[np.int64]:
    """Positions kept; selecting by them is up to three times faster than by bools."""
    return np.flatnonzero(_bits(masks))


def _sizes(within: Layout | Sequence[int]) -> list[int]:
    return [slot.numel for slot in within.masked_slots] if isinstance(within, Layout) else list(within)


def _counts(masks: Masks) -> list[int]:
    """Weights kept in each maskable slot."""
    return list(masks.counts().values())


def _index_width(total: int) -> int:
    return max(1, (total - 1).bit_length()) if total else 1
