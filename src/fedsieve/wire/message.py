"""Messages: one header, one table of sections, the sections, a checksum. The bytes are specified in docs/wire.md.

    FSV | version | kind length | sections | round | layout fingerprint | kind
    codec | name length | body length | name      for each section
    bodies, the table and each body filled up with zeros to a multiple of 4 bytes
    XXH3-64 of everything before

The checksum finds accidents. It is no authentication, so every read checks what it decodes by itself as well.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from xxhash import xxh3_64, xxh3_64_intdigest

from fedsieve.params import Layout, Masks, Params
from fedsieve.wire import sections as codecs
from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.sections import Codec, Halved, Section

__all__ = [
    "Codec",
    "Message",
    "Reason",
    "Section",
    "WireError",
    "pack",
    "pack_into",
    "packed_size",
    "phases",
    "unpack",
]

MAGIC = b"FSV"
VERSION = 1
LIMIT = 2**31
"""largest payload accepted unless told otherwise, in bytes"""
PHASES = ("train", "eval", "setup")
"""kinds that are a phase of the ledger by their own name; all others are control"""

_HEADER = struct.Struct("<3sBBBI8s")
_ENTRY = struct.Struct("<BBI")
_KIND = re.compile(rb"[a-z0-9_-]{1,16}")
_NAME = re.compile(rb"[a-z0-9_]{1,16}")
_CODECS = frozenset(int(codec) for codec in Codec)

Opener = Callable[["Message", str, Masks | None], Params]
"""reads the model of a section by its name, the masks it is under being known; None: it is dense"""


@dataclass(frozen=True, eq=False)
class Message:
    """What one end says to the other in one exchange.

    The reading methods check completely what they return, and raise `WireError`: MISSING for a section that is not there,
    SECTION for one of another codec, and what their codec lists.
    """

    kind: str
    """which exchange this is: "train", "eval", "setup" or an algorithm's own word, [a-z0-9_-]{1,16}"""
    round: int
    """in [0, 2**32)"""
    layout: Layout
    sections: Mapping[str, Section]
    """name [a-z0-9_]{1,16} -> encoded value, in order; at most 255"""
    opener: Opener | None = None
    """reads the models of this message, if they are written otherwise than as `dense` and `values` write them"""
    _decoded: dict[str, Params] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind.encode()):
            raise ValueError(f"kind {self.kind!r} is not 1 to 16 of the characters a-z 0-9 _ -")
        if not 0 <= self.round < 2**32:
            raise ValueError(f"round {self.round} is not in [0, 2**32)")
        wrong = [name for name in self.sections if not _NAME.fullmatch(name.encode())]
        if wrong or len(self.sections) > 255:
            raise ValueError(f"{len(self.sections)} sections of at most 255; names not 1 to 16 of a-z 0-9 _: {wrong}")

    def reply(self, **sections: Section) -> Message:
        """Return a message of the same kind, round and layout."""
        return Message(self.kind, self.round, self.layout, sections)

    def dense(self, name: str) -> Params:
        """All parameters. They may be a view of the payload, and whoever asks again gets the same: only to be read."""
        if self.opener is not None:
            return self.opener(self, name, None)
        if name not in self._decoded:
            self._decoded[name] = codecs.read_dense(self._section(name, codecs.DENSE), self.layout)
        return self._decoded[name]

    def values(self, name: str, masks: Masks) -> Params:
        """Parameters of which the kept ones were sent; zero where pruned."""
        if self.opener is not None:
            return self.opener(self, name, masks)
        return codecs.read_values(self._section(name, codecs.VALUES), masks)

    def mask(self, name: str, within: Masks | None = None) -> Masks:
        """Masks; `within` must be the masks that the sender gave, if it gave some."""
        return codecs.read_mask(self._section(name, {*codecs.MASK, *codecs.WITHIN}), self.layout, within)

    def indices(self, name: str, sizes: Sequence[int] | None = None) -> Tensor:
        """Positions in the maskable part, or in tensors of these sizes, strictly ascending, int64 of shape (k,)."""
        section = self._section(name, {*codecs.INDICES, Codec.INDICES_PACKED})
        return codecs.read_indices(section, self.layout if sizes is None else sizes)

    def signs(self, name: str, masks: Masks) -> Tensor:
        """+1 and -1, int8 of shape (kept,)."""
        return codecs.read_signs(self._section(name, codecs.SIGNS), masks)

    def integers(self, name: str) -> Tensor:
        """Whole numbers, int32 of shape (n,)."""
        return codecs.read_integers(self._section(name, {Codec.INTEGERS_PACKED, Codec.INTEGERS_CODED}), self.layout)

    def seed(self, name: str) -> int:
        """A seed in [0, 2**64)."""
        return int(codecs.read_number(self._section(name, {Codec.SEED})))

    def number(self, name: str) -> int | float:
        """An int or a finite float, as it was sent."""
        return codecs.read_number(self._section(name, {Codec.INTEGER, Codec.REAL}))

    def vector(self, name: str) -> Tensor:
        """Finite numbers, bfloat16, float16, 32 or 64 of shape (n,). They may be a view of the payload: only to be read."""
        return codecs.read_vector(self._section(name, codecs.VECTOR))

    def _section(self, name: str, allowed: Collection[Codec]) -> Section:
        section = self.sections.get(name)
        if section is None:
            raise WireError(Reason.MISSING, 0, f"no section {name!r} in a message of kind {self.kind!r}")
        if section.codec not in allowed:
            raise WireError(Reason.SECTION, section.offset, f"section {name!r} is {section.codec.name}")
        return section


def packed_size(message: Message) -> int:
    """Return the length of the payload in bytes."""
    return sum(map(len, _parts(message))) + 8


def pack(message: Message) -> bytes:
    """Return the payload: one copy of the sections, and the checksum."""
    parts, checksum = [part.converted() if isinstance(part, Halved) else part for part in _parts(message)], xxh3_64()
    for part in parts:
        checksum.update(part)
    return b"".join([*parts, checksum.intdigest().to_bytes(8, "little")])


def pack_into(message: Message, target: memoryview) -> int:
    """Write the payload at the beginning of `target`, such as shared memory, and return its length in bytes."""
    parts, end = _parts(message), 0
    target = target.cast("B")
    if len(target) < (size := sum(map(len, parts)) + 8):
        raise ValueError(f"the payload has {size} bytes, its place {len(target)}")
    for part in parts:
        if isinstance(part, Halved):
            part.write(target[end : (end := end + len(part))])
        else:
            target[end : (end := end + len(part))] = part
    target[end:size] = xxh3_64_intdigest(target[:end]).to_bytes(8, "little")
    return size


def _parts(message: Message) -> list[bytes | memoryview | Halved]:
    """Return the payload in pieces, without the checksum."""
    table = bytearray(
        _HEADER.pack(MAGIC, VERSION, len(message.kind), len(message.sections), message.round, message.layout.fingerprint)
    )
    table += message.kind.encode()
    bodies: list[bytes | memoryview | Halved] = []
    for name, section in message.sections.items():
        if len(section.body) >= 2**32:
            raise ValueError(f"section {name!r} has {len(section.body)} bytes, at most 2**32 - 1 are possible")
        table += _ENTRY.pack(section.codec, len(name), len(section.body)) + name.encode()
        bodies += [section.body, bytes(-len(section.body) % 4)]
    table += bytes(-len(table) % 4)
    return [bytes(table), *bodies]


class _Entry(NamedTuple):
    at: int
    """byte of the payload where the entry stands"""
    codec: int
    name: bytes
    begin: int
    end: int
    """of the body; zeros follow up to the next multiple of 4"""


class _Table(NamedTuple):
    round: int
    fingerprint: bytes
    kind: bytes
    end: int
    """of the entries; zeros follow up to the next multiple of 4"""
    entries: list[_Entry]


def _table(payload: memoryview) -> _Table:
    """Read header and table and check that the payload is as long as they say, and nothing else."""
    if len(payload) < _HEADER.size:
        raise WireError(Reason.TRUNCATED, len(payload), f"{len(payload)} bytes, less than a header")
    magic, version, kind_length, count, round, fingerprint = _HEADER.unpack_from(payload)
    if magic != MAGIC:
        raise WireError(Reason.MAGIC, 0, f"the payload begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise WireError(Reason.VERSION, 3, f"the payload is of version {version}, known is {VERSION}")
    at = _HEADER.size + kind_length
    kind = bytes(payload[_HEADER.size : at])
    heads: list[tuple[int, int, bytes, int]] = []
    for _ in range(count):
        if at + _ENTRY.size > len(payload):
            raise WireError(Reason.TRUNCATED, len(payload), "the payload ends within the table")
        codec, name_length, length = _ENTRY.unpack_from(payload, at)
        name_at = at + _ENTRY.size
        heads.append((at, codec, bytes(payload[name_at : name_at + name_length]), length))
        at = name_at + name_length
    end = _aligned(at)
    entries = []
    for where, codec, name, length in heads:
        entries.append(_Entry(where, codec, name, end, end + length))
        end = _aligned(end + length)
    if len(payload) != end + 8:
        reason = Reason.TRUNCATED if len(payload) < end + 8 else Reason.TRAILING
        raise WireError(reason, min(len(payload), end + 8), f"{len(payload)} bytes, header and table make {end + 8}")
    return _Table(round, fingerprint, kind, at, entries)


def _aligned(end: int) -> int:
    return end + -end % 4


def unpack(payload: bytes | bytearray | memoryview, layout: Layout, *, limit: int = LIMIT) -> Message:
    """Check a payload and return its message; the sections are views of it, decoded when they are read.

    Args:
        payload: from anyone.
        layout: the receiver's own.
        limit: largest payload accepted, in bytes.

    Raises:
        WireError: LENGTH, TRUNCATED, TRAILING, MAGIC, VERSION, CHECKSUM, LAYOUT, KIND, SECTION or PADDING.
    """
    view = memoryview(payload).cast("B")
    if len(view) > limit:
        raise WireError(Reason.LENGTH, limit, f"the payload has {len(view)} bytes, at most {limit} are accepted")
    table = _table(view)
    if xxh3_64_intdigest(view[:-8]) != int.from_bytes(view[-8:], "little"):
        raise WireError(Reason.CHECKSUM, len(view) - 8, "the bytes are not those that were sent")
    if table.fingerprint != layout.fingerprint:
        raise WireError(
            Reason.LAYOUT, 10, f"the payload is of layout {table.fingerprint.hex()}, this model of {layout.fingerprint.hex()}"
        )
    if not _KIND.fullmatch(table.kind):
        raise WireError(Reason.KIND, _HEADER.size, f"the kind is {table.kind!r}")
    _zeros(view, table.end)
    found: dict[str, Section] = {}
    for entry in table.entries:
        if entry.codec not in _CODECS or not _NAME.fullmatch(entry.name) or entry.name.decode() in found:
            raise WireError(Reason.SECTION, entry.at, f"section {entry.name!r} of codec {entry.codec:#04x}")
        _zeros(view, entry.end)
        found[entry.name.decode()] = Section(Codec(entry.codec), view[entry.begin : entry.end], entry.begin)
    return Message(table.kind.decode(), table.round, layout, found)


def _zeros(view: memoryview, end: int) -> None:
    """Check the bytes up to the next multiple of 4."""
    if any(view[end : _aligned(end)]):
        raise WireError(Reason.PADDING, end, "bytes that fill up to a multiple of 4 are not zero")


def phases(payload: bytes | bytearray | memoryview | Message) -> dict[str, int]:
    """Split the length of a payload, in bytes, by what it is spent on; the parts sum to it exactly.

    A message of kind eval is all eval. In others, mask and index sections with the zeros after them count as "masks"; all else
    as the kind of the message if that is "train" or "setup", else as "control". What is no payload at all is control too.
    """
    if isinstance(payload, Message):
        lengths = [(int(section.codec), len(section.body)) for section in payload.sections.values()]
        return _split(packed_size(payload), payload.kind, lengths)
    view = memoryview(payload).cast("B")
    try:
        table = _table(view)
    except WireError:
        return {"control": len(view)}
    return _split(len(view), table.kind.decode("latin-1"), [(entry.codec, entry.end - entry.begin) for entry in table.entries])


def _split(total: int, kind: str, lengths: list[tuple[int, int]]) -> dict[str, int]:
    own = kind if kind in PHASES else "control"
    masks = 0 if own == "eval" else sum(_aligned(length) for codec, length in lengths if codec >> 4 in (0x3, 0x4))
    return {own: total - masks, "masks": masks} if masks else {own: total}
