"""The one byte counter: every number of bytes in a record is a sum of `len(payload)` taken here."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

from fedsieve.wire.message import phases

Direction = Literal["up", "down"]


class Ledger:
    """Bytes that one round carried, by direction and phase, all of them exact integers."""

    def __init__(self) -> None:
        self.phases: defaultdict[str, dict[Direction, int]] = defaultdict(lambda: {"up": 0, "down": 0})
        """phase -> direction -> bytes; a payload that several clients receive counts for each"""
        self._sent: dict[int, tuple[bytes | bytearray, dict[str, int]]] = {}

    def count(self, direction: Direction, payload: bytes | bytearray) -> None:
        """Count one payload that was carried to or from a client. One object sent down to several is parsed once."""
        split = self._sent[id(payload)][1] if id(payload) in self._sent else phases(payload)
        if direction == "down":
            self._sent[id(payload)] = payload, split
        for phase, nbytes in split.items():
            self.phases[phase][direction] += nbytes

    def headline(self, direction: Direction) -> int:
        """Return the bytes of all phases but eval: what the method costs, not what measuring it costs."""
        return sum(split[direction] for phase, split in self.phases.items() if phase != "eval")

    def broadcast_once(self) -> int:
        """Return the headline bytes down if each distinct payload were sent once, over a medium that all clients hear."""
        return sum(nbytes for _, split in self._sent.values() for phase, nbytes in split.items() if phase != "eval")

    def row(self) -> dict[str, Any]:
        """Return the counts as a record holds them."""
        return {
            "bytes_up": self.headline("up"),
            "bytes_down": self.headline("down"),
            "bytes_down_once": self.broadcast_once(),
            "phases": {phase: dict(split) for phase, split in sorted(self.phases.items())},
        }
