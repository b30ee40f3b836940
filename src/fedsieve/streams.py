"""Named random streams: (seed, round, client, purpose) -> the same numbers, always and everywhere.

A stream is Philox4x64-10 in counter mode (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by the
BLAKE2b hash of its name. What both ends of a wire regenerate uses only the integer words and the exact maps below (shift,
multiply, compare, stable sort), so it does not depend on platform, library version, or on who drew before.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

SERVER = -1
"""the `client` of a stream that belongs to the server"""


class _Key(ISeedSequence):
    """Hands a key to Philox as it is; `Philox(key=...)` asks the system for entropy first, which takes four times as long."""

    def __init__(self, key: NDArray[np.uint64]) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> NDArray[np.uint64]:
        return self._key


class Stream:
    """One stream, read from its beginning. Two streams of the same name give the same numbers."""

    __slots__ = ("_bits",)

    def __init__(self, key: bytes) -> None:
        self._bits = np.random.Philox(_Key(np.frombuffer(key, dtype="<u8").astype(np.uint64)))  # type: ignore[arg-type]

    def words(self, n: int) -> NDArray[np.uint64]:
        """Draw n independent 64-bit words, shape (n,)."""
        return np.asarray(self._bits.random_raw(n), dtype=np.uint64)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Draw n multiples of 2**-53, uniform in [0, 1), shape (n,). Exact on every platform."""
        return (self.words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def permutation(self, n: int) -> NDArray[np.int64]:
        """Draw a permutation of range(n), shape (n,), as the stable sorting order of n words."""
        return np.argsort(self.words(n), kind="stable")

    def choice(self, n: int, k: int) -> NDArray[np.int64]:
        """Draw k of range(n) without replacement, ascending, shape (k,): the first k of a permutation, without sorting all."""
        words = self.words(n)
        if not 0 < k < n:
            return np.arange(n)[:k]
        last = np.partition(words, k - 1)[k - 1]
        chosen = np.flatnonzero(words <= last)
        if len(chosen) > k:  # equal words: the stable order prefers the earlier ones
            chosen = np.delete(chosen, np.flatnonzero(words[chosen] == last)[k - len(chosen) :])
        return chosen

    def word(self) -> int:
        """Draw one word as an int below 2**63, the range of a torch seed."""
        return int(self.words(1)[0] >> np.uint64(1))

    def numpy(self) -> np.random.Generator:
        """Continue as a numpy generator: for numbers that only one end needs."""
        return np.random.Generator(self._bits)


@dataclass(frozen=True, slots=True)
class Streams:
    """The family of streams of one seed, at one round and client. `streams("shuffle")` is one of them."""

    seed: int
    round: int = 0
    client: int = SERVER

    def at(self, *, round: int | None = None, client: int | None = None) -> Streams:
        """Return the same family at another round or client."""
        return replace(self, round=self.round if round is None else round, client=self.client if client is None else client)

    def __call__(self, purpose: str) -> Stream:
        """Return the stream of this purpose from its beginning."""
        name = struct.pack("<Qqq", self.seed, self.round, self.client) + purpose.encode()
        return Stream(blake2b(name, digest_size=16).digest())
