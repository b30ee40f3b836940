"""Bits and integers as bytes: packed, or entropy-coded with a model that both ends rebuild from integer counts.

The coder is asymmetric numeral systems (Duda 2013, arXiv 1311.2540) in the form of `constriction`'s `AnsCoder`: 32-bit
words, a 64-bit state, frequencies in units of 2**-24. Whatever words a decoder is given, it returns symbols and cannot
fail, and it ends with an empty coder exactly if an encoder wrote those words; so hostile bytes are found out, and a value
has one encoding per model. The arithmetic is written out for other languages in docs/wire.md.

A decoder allocates by what the reader already knows (the size of the layout), never by a number that it has read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum, StrEnum
from math import ceil, log2
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.bool_]
Integers = NDArray[np.int64]

TOTAL = 1 << 24
"""sum of the frequencies of a model"""
LEVELS = 4096
"""most levels of integers that a histogram is sent for"""
_POPCOUNT = np.array([byte.bit_count() for byte in range(256)])
_CHUNK = 1 << 16
"""integers packed at a time: a multiple of 8, so that each chunk ends at a byte"""


class Reason(StrEnum):
    """Why a payload or a value was refused: a closed list."""

    TRUNCATED = "truncated"
    """The payload ends before its header, its table or its sections do."""
    TRAILING = "trailing"
    """The payload goes on after the checksum."""
    MAGIC = "magic"
    """The payload does not begin with the three bytes FSV."""
    VERSION = "version"
    """The payload is of a version of the format that is not known here."""
    CHECKSUM = "checksum"
    """The bytes are not those that were sent."""
    LAYOUT = "layout"
    """The payload is of a model with other tensors."""
    KIND = "kind"
    """The kind of the message is not 1 to 16 of the characters a-z 0-9 _ -."""
    SECTION = "section"
    """A section has an unknown codec, another codec than the one read, or a name that is malformed or used twice."""
    MISSING = "missing"
    """The message has no section of that name."""
    LENGTH = "length"
    """The payload exceeds the limit, or a section is longer or shorter than what it holds."""
    PADDING = "padding"
    """A bit or a byte that fills up to a boundary is not zero."""
    COUNT = "count"
    """A stated count exceeds what there is, or is not the count of what was decoded."""
    ORDER = "order"
    """Indices are not strictly ascending."""
    RANGE = "range"
    """An index, an integer or a mask reaches outside of what is allowed."""
    NONFINITE = "nonfinite"
    """A value is NaN or infinite, or would be in the precision asked for."""
    CODE = "code"
    """The entropy-coded words are not those that an encoder writes."""


class WireError(Exception):
    """A payload, or a value in it, was refused.

    Attributes:
        reason: one of the closed list.
        offset: byte of the payload at which it was found; 0 for a value that was not yet in a payload.
    """

    def __init__(self, reason: Reason, offset: int, detail: str) -> None:
        super().__init__(reason, offset, detail)
        self.reason = reason
        self.offset = offset
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} at byte {self.offset}: {self.detail}"


class Coding(IntEnum):
    """How a vector of bits is written."""

    BITMAP = 0
    """one bit each"""
    WHOLE = 1
    """entropy-coded with one count for all"""
    GROUPS = 2
    """entropy-coded with one count for each group (each slot of the layout)"""


def entropy_bits(k: int, n: int) -> float:
    """Return n H(k/n), the bits that n independent bits with k ones cost at least (Shannon 1948)."""
    if k in (0, n):
        return 0.0
    p = k / n
    return -n * (p * log2(p) + (1 - p) * log2(1 - p))


def pack_bits(values: Integers, width: int) -> bytes:
    """Pack n integers in [0, 2**width), width in 1..32, into ceil(n * width / 8) bytes.

    Value i takes the bits [i * width, (i + 1) * width), its lowest first; bit b is bit b % 8 of byte b // 8.
    """
    if width in (8, 16, 32):
        return values.astype(f"<u{width // 8}").tobytes()
    words = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    chunks = (words[i : i + _CHUNK] for i in range(0, len(words), _CHUNK))
    return b"".join(
        np.packbits(np.unpackbits(chunk, axis=1, count=width, bitorder="little"), bitorder="little").tobytes()
        for chunk in chunks
    )


def unpack_bits(body: memoryview, n: int, width: int, offset: int = 0) -> Integers:
    """Invert `pack_bits`; WireError LENGTH or PADDING unless `body` is exactly that."""
    raw = _exactly(body, n * width, offset)
    if width in (8, 16, 32):
        return raw.view(f"<u{width // 8}").astype(np.int64)
    values = np.empty(n, dtype=np.int64)
    for i in range(0, n, _CHUNK):
        m = min(_CHUNK, n - i)
        planes = np.unpackbits(raw[i * width // 8 :], count=m * width, bitorder="little").reshape(m, width)
        words = np.zeros((m, 4), dtype=np.uint8)
        words[:, : (width + 7) // 8] = np.packbits(planes, axis=1, bitorder="little")
        values[i : i + m] = words.view("<u4")[:, 0]
    return values


def _exactly(body: memoryview, nbits: int, offset: int) -> NDArray[np.uint8]:
    """Return the bytes of `body`, which must be nbits bits followed by less than 8 zero bits."""
    if len(body) != (nbits + 7) // 8:
        raise WireError(Reason.LENGTH, offset, f"{len(body)} bytes for {nbits} bits")
    if nbits % 8 and body[-1] >> nbits % 8:
        raise WireError(Reason.PADDING, offset + len(body) - 1, "bits after the last value are not zero")
    return np.frombuffer(body, dtype=np.uint8)


def put_varints(values: Iterable[int]) -> bytes:
    """Write integers >= 0 in groups of 7 bits, the lowest first; the high bit of a byte says that more follow (LEB128)."""
    out = bytearray()
    for value in values:
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def take_varints(body: memoryview, n: int, at: int = 0, offset: int = 0) -> tuple[list[int], int]:
    """Read n integers below 2**35 at byte `at`, each in its shortest form; return them and the byte after them."""
    values = []
    for _ in range(n):
        value = 0
        for shift in range(0, 36, 7):
            if at >= len(body):
                raise WireError(Reason.LENGTH, offset + at, "the section ends within an integer")
            byte = body[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        if shift == 35 or (shift and not byte):
            raise WireError(Reason.RANGE, offset + at - 1, "an integer is 2**35 or more, or not in its shortest form")
        values.append(value)
    return values, at


def byte_frequencies(k: int, n: int) -> Integers:
    """Return the frequencies, shape (256,), of bytes that hold 8 of n bits, k of them set, 0 < k <= n / 2.

    A byte with j bits set has the probability p**j (1 - p)**(8 - j), p = k / n, computed in 32-bit fixed point by repeated
    multiplication. Each byte gets at least 1; what rounding leaves over goes to byte 0, the most frequent.
    """
    p = (k << 32) // n
    ones, zeros = [1 << 32], [1 << 32]
    for _ in range(8):
        ones.append(ones[-1] * p >> 32)
        zeros.append(zeros[-1] * ((1 << 32) - p) >> 32)
    classes = [1 + ((ones[j] * zeros[8 - j] >> 32) * (TOTAL - 256) >> 32) for j in range(9)]
    frequencies: Integers = np.array(classes, dtype=np.int64)[_POPCOUNT]
    frequencies[0] += TOTAL - frequencies.sum()
    return frequencies


def level_frequencies(histogram: Integers) -> Integers:
    """Return frequencies in proportion to a histogram of 2 or more levels, each at least 1; the rest to the first mode."""
    frequencies: Integers = 1 + histogram * (TOTAL - histogram.size) // histogram.sum()
    frequencies[histogram.argmax()] += TOTAL - frequencies.sum()
    return frequencies


def _model(frequencies: Integers) -> Any:
    """Return constriction's model with exactly these frequencies.

    Its fast quantiser gives symbol i the cumulative frequency i + floor(s (p_0 + ... + p_{i-1})) with
    s = (TOTAL - symbols) / sum(p). From p = frequency - 1 follows s = 1 and whole numbers below 2**24: nothing is rounded.
    """
    return constriction.stream.model.Categorical((frequencies - 1).astype(np.float32), perfect=False)


def _coder(body: memoryview, offset: int) -> Any:
    """Return a decoder of these words."""
    if len(body) % 4:
        raise WireError(Reason.LENGTH, offset, f"{len(body)} bytes are no whole number of 32-bit words")
    words = np.frombuffer(body, dtype="<u4").astype(np.uint32)
    if words.size and not words[-1]:
        raise WireError(Reason.CODE, offset + len(body) - 4, "the last word is zero")
    return constriction.stream.stack.AnsCoder(words)


def _finish(coder: Any, offset: int) -> None:
    if not coder.is_empty():
        raise WireError(Reason.CODE, offset, "words are left over")


def _spans(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin = 0
    for size in sizes:
        yield begin, begin + size
        begin += size


def encode_mask(bits: Bits, groups: Sequence[int]) -> tuple[Coding, bytes]:
    """Write bits, shape (sum(groups),), in the smallest of the codings: O(n) time.

    Layers of different density are cheaper with a count each: sum_g n_g H(k_g / n_g) <= n H(k / n).
    """
    counts = [int(np.count_nonzero(bits[begin:end])) for begin, end in _spans(groups)]
    choices = [(Coding.WHOLE, [bits.size], [sum(counts)]), (Coding.GROUPS, list(groups), counts)]
    coding, sizes, counts = min(choices, key=lambda choice: _floor_nbytes(*choice[1:]))
    if _floor_nbytes(sizes, counts) < (bits.size + 7) // 8:
        body = put_varints(counts) + _encode_groups(bits, sizes, counts)
        if len(body) < (bits.size + 7) // 8:
            return coding, body
    return Coding.BITMAP, np.packbits(bits, bitorder="little").tobytes()


def _floor_nbytes(sizes: Sequence[int], counts: Sequence[int]) -> int:
    """Return the entropy in whole bytes, with the counts."""
    return ceil(sum(map(entropy_bits, counts, sizes)) / 8) + len(put_varints(counts))


def _encode_groups(bits: Bits, sizes: Sequence[int], counts: Sequence[int]) -> bytes:
    coder = constriction.stream.stack.AnsCoder()
    for (begin, end), k in reversed(list(zip(_spans(sizes), counts, strict=True))):  # a stack: written from the end
        n = end - begin
        if 0 < k < n:
            rare = bits[begin:end] if 2 * k <= n else ~bits[begin:end]
            symbols = np.packbits(rare, bitorder="little").astype(np.int32)
            coder.encode_reverse(symbols, _model(byte_frequencies(min(k, n - k), n)))
    return np.asarray(coder.get_compressed()).astype("<u4").tobytes()


def decode_mask(coding: Coding, body: memoryview, groups: Sequence[int], offset: int = 0) -> Bits:
    """Invert `encode_mask`; the groups are the reader's own.

    Raises:
        WireError: LENGTH, PADDING, COUNT, RANGE or CODE.
    """
    n = sum(groups)
    if coding is Coding.BITMAP:
        return np.unpackbits(_exactly(body, n, offset), count=n, bitorder="little").view(np.bool_)
    sizes = [n] if coding is Coding.WHOLE else groups
    counts, at = take_varints(body, len(sizes), offset=offset)
    coder = _coder(body[at:], offset + at)
    bits = np.zeros(n, dtype=np.bool_)
    for (begin, end), k in zip(_spans(sizes), counts, strict=True):
        bits[begin:end] = _decode_group(coder, end - begin, k, offset)
    _finish(coder, offset + at)
    return bits


def _decode_group(coder: Any, n: int, k: int, offset: int) -> Bits | bool:
    if k > n:
        raise WireError(Reason.COUNT, offset, f"{k} of {n} bits set")
    if k in (0, n):
        return k > 0
    rare = min(k, n - k)
    symbols = coder.decode(_model(byte_frequencies(rare, n)), (n + 7) // 8).astype(np.uint8)
    bits = np.unpackbits(symbols, bitorder="little").view(np.bool_)
    if bits[n:].any():
        raise WireError(Reason.PADDING, offset, "bits after the last one of a group are not zero")
    if np.count_nonzero(bits) != rare:
        raise WireError(Reason.COUNT, offset, f"the count {k} of {n} is not that of the decoded bits")
    return bits[:n] if 2 * k <= n else ~bits[:n]


def encode_integers(values: Integers, width: int | None = None) -> tuple[bool, bytes]:
    """Write integers of 32 bits, shape (n,): entropy-coded by their histogram, or packed, the smaller.

    Args:
        values: in [-2**31, 2**31).
        width: bits of each if they are to be packed, in 1..32; it must hold max - min.

    Returns:
        Whether they are entropy-coded, and the bytes.
    """
    if not values.size:
        return False, put_varints([0])
    low, high = int(values.min()), int(values.max())
    if low < -(2**31) or high >= 2**31:
        raise WireError(Reason.RANGE, 0, f"integers from {low} to {high}, not within 32 bits")
    least = max(1, (high - low).bit_length())
    if width is not None and not least <= width <= 32:
        raise ValueError(f"integers from {low} to {high} need {least} to 32 bits, not {width}")
    levels = values - low
    head = put_varints([values.size, 2 * low if low >= 0 else -2 * low - 1])
    packed_nbytes = (values.size * (width or least) + 7) // 8
    if width is None and high - low < LEVELS:
        histogram = np.bincount(levels)
        body = put_varints([histogram.size, *histogram.tolist()])
        if len(body) < packed_nbytes:
            body += _encode_levels(levels, histogram)
            if len(body) < 1 + packed_nbytes:
                return True, head + body
    return False, head + bytes([width or least]) + pack_bits(levels, width or least)


def _encode_levels(levels: Integers, histogram: Integers) -> bytes:
    if histogram.size == 1:
        return b""
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(levels.astype(np.int32), _model(level_frequencies(histogram)))
    return np.asarray(coder.get_compressed()).astype("<u4").tobytes()


def decode_integers(coded: bool, body: memoryview, limit: int, offset: int = 0) -> NDArray[np.int32]:
    """Invert `encode_integers`; more than `limit` entropy-coded integers are refused.

    Raises:
        WireError: LENGTH, PADDING, COUNT, RANGE or CODE.
    """
    (n,), at = take_varints(body, 1, offset=offset)
    if n == 0 and not coded:
        _exactly(body[at:], 0, offset + at)
        return np.empty(0, dtype=np.int32)
    (zigzag, width), at = take_varints(body, 2, at, offset)
    low = -(zigzag + 1 >> 1) if zigzag & 1 else zigzag >> 1
    if coded:
        if not 1 <= n <= limit:
            raise WireError(Reason.COUNT, offset, f"{n} integers; 1 to {limit} are allowed")
        levels = _decode_levels(body, at, n, width, offset)
    else:
        if not 1 <= width <= 32:
            raise WireError(Reason.RANGE, offset + at - 1, f"integers of {width} bits; 1 to 32 are allowed")
        levels = unpack_bits(body[at:], n, width, offset + at)
    if low < -(2**31) or low + int(levels.max()) >= 2**31:
        raise WireError(Reason.RANGE, offset, f"integers from {low} to {low + int(levels.max())}, not within 32 bits")
    return (levels + low).astype(np.int32)


def _decode_levels(body: memoryview, at: int, n: int, size: int, offset: int) -> Integers:
    if not 1 <= size <= LEVELS:
        raise WireError(Reason.RANGE, offset + at - 1, f"{size} levels; 1 to {LEVELS} are allowed")
    counts, at = take_varints(body, size, at, offset)
    histogram = np.array(counts, dtype=np.int64)
    if histogram.sum() != n or not (histogram[0] and histogram[-1]):
        raise WireError(Reason.COUNT, offset, f"a histogram of {histogram.sum()} integers for {n}, or its ends are empty")
    coder = _coder(body[at:], offset + at)
    levels = np.zeros(n, dtype=np.int64)
    if size > 1:
        levels[:] = coder.decode(_model(level_frequencies(histogram)), n)
    _finish(coder, offset + at)
    if size > 1 and not np.array_equal(np.bincount(levels, minlength=size), histogram):
        raise WireError(Reason.COUNT, offset, "the histogram is not that of the decoded integers")
    return levels
