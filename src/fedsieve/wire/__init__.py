"""The wire: values become sections, sections a message, a message bytes, and bytes are counted."""

from fedsieve.wire.ledger import Ledger
from fedsieve.wire.message import Codec, Message, Reason, Section, WireError, pack, pack_into, packed_size, phases, unpack

__all__ = [
    "Codec",
    "Ledger",
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
