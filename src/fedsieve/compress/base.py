"""What a compressor is, and how one is found by name.

A compressor sees vectors: of the numbers of a model that travel, those that masks keep and those that no mask covers, and not
the normalisation statistics, which travel as they are. How a vector is cut out of a model, what it is a difference to, and who
holds which state is the business of the link (`engine/link.py`); a compressor is pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.errors import UsageError
from fedsieve.params import Kind, Layout, Masks
from fedsieve.settings import nearest
from fedsieve.streams import Stream, Streams
from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.message import Message
from fedsieve.wire.sections import Section

Written = Mapping[str, Section]
"""what a vector became: sections by short names [a-z0-9_]{1,8}"""


@dataclass(frozen=True, slots=True)
class Caps:
    """What a compressor is like, for those who compose it with others."""

    unbiased: bool = False
    """what is decoded is right on average"""
    linear: bool = False
    """what several clients sent may be summed before it is decoded, so it goes with secure aggregation"""
    client_memory: bool = False
    """a client keeps a vector between its rounds"""
    server_memory: bool = False
    """the server keeps something between rounds"""
    joint: bool = False
    """the replies of a round are decoded together, when all have come"""
    down: bool = True
    """it may compress broadcasts: there the server is the one that sends, with no cohort and no memory"""


@dataclass(frozen=True, eq=False)
class Support:
    """Which numbers of a model travel, in the order of the layout: n of them."""

    layout: Layout
    masks: Masks | None = None
    """of the maskable ones; None: all"""

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of each tensor, without those that have none; they sum to n."""
        return [size for size in self._counts.values() if size]

    @cached_property
    def names(self) -> list[str]:
        """Names of the tensors of `sizes`."""
        return [name for name, size in self._counts.items() if size]

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where each number stands among the trained ones of the model, ascending, shape (n,)."""
        if self.masks is None:
            return np.arange(self.layout.trainable)
        dense = np.arange(self.layout.maskable, self.layout.trainable)
        return np.concatenate([np.flatnonzero(self.masks.kept.numpy()), dense])

    def take(self, flat: Tensor) -> Tensor:
        """Cut the n numbers out of a vector of at least `layout.trainable`."""
        if self.masks is None:
            return flat[: self.layout.trainable]
        return torch.from_numpy(flat.numpy().take(self.places))

    def put(self, x: Tensor) -> Tensor:
        """Return the n numbers in their places, zero elsewhere, shape (layout.trainable,)."""
        if self.masks is None:
            return x
        flat = np.zeros(self.layout.trainable, dtype=np.float32)
        flat[self.places] = x.numpy()
        return torch.from_numpy(flat)

    @cached_property
    def _counts(self) -> dict[str, int]:
        kept = self.masks.counts() if self.masks is not None else {}
        slots = [slot for slot in self.layout.slots if slot.kind is not Kind.BUFFER]
        return {slot.name: kept.get(slot.name, slot.numel) for slot in slots}


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """What both ends know of a vector before it is sent."""

    sizes: Sequence[int]
    """numbers of each of its tensors, >= 1; they sum to n"""
    streams: Streams
    """of this round and client, so both ends draw the same numbers"""
    name: str = "update"
    """of the section"""
    told: Mapping[str, int | float] = field(default_factory=dict)
    """numbers that the server announced for this exchange"""
    loss: float | None = None
    """mean training loss that goes with an update; None: it is not known"""
    _drawn: dict[float, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)

    @property
    def n(self) -> int:
        """Numbers in the vector."""
        return sum(self.sizes)

    def stream(self, purpose: str) -> Stream:
        """Return a random stream that both ends have."""
        return self.streams(f"compress/{self.name}/{purpose}")

    def positions(self, share: float) -> NDArray[np.int64]:
        """Draw random positions, ascending, each with probability `share` in (0, 1]: both ends draw the same.

        There are share * n of them, or one of the two whole numbers around that.
        """
        if share not in self._drawn:
            stream, whole = self.stream("positions"), share * self.n
            k = int(whole) + int(stream.uniform(1)[0] < whole - int(whole))
            self._drawn[share] = stream.choice(self.n, k)
        return self._drawn[share]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut a vector into its tensors."""
        return torch.split(x, list(self.sizes))


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The sections of one compressed vector in a message. Every read checks what it returns, and raises WireError."""

    message: Message
    name: str
    """of the vector: its section `levels` is `name_levels`"""

    def integers(self, part: str, n: int, low: int, high: int) -> Tensor:
        """Read n whole numbers in [low, high], int32 of shape (n,)."""
        found = self.message.integers(f"{self.name}_{part}")
        if found.numel() != n:
            raise WireError(Reason.COUNT, 0, f"section {self.name}_{part} holds {found.numel()} whole numbers, not {n}")
        if n and not low <= int(found.min()) <= int(found.max()) <= high:
            raise WireError(Reason.RANGE, 0, f"section {self.name}_{part} holds a number outside of [{low}, {high}]")
        return found

    def floats(self, part: str, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read n finite numbers of a type, shape (n,), as float32."""
        found = self.message.vector(f"{self.name}_{part}")
        if found.dtype != dtype or found.numel() != n:
            said = f"{found.numel()} numbers of {found.dtype}, not {n} of {dtype}"
            raise WireError(Reason.COUNT, 0, f"section {self.name}_{part} holds {said}")
        return found.float()

    def places(self, part: str, sizes: Sequence[int]) -> Tensor:
        """Read positions in tensors of these sizes, strictly ascending, int64."""
        return self.message.indices(f"{self.name}_{part}", sizes)


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """A compressed vector that a client sent."""

    client: int
    parts: Parts
    frame: Frame
    support: Support

    @property
    def examples(self) -> float:
        """Training examples of the client, its weight; 1 if it does not say."""
        message = self.parts.message
        return float(message.number("examples")) if "examples" in message.sections else 1.0


class Compressor:
    """A lossy coding: a frozen dataclass of settings with pure steps. Two suffice; the others have a default."""

    __slots__ = ()
    caps: ClassVar[Caps] = Caps()

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, Tensor | None]:
        """Write a vector.

        Args:
            x: finite, float32 of shape (n,), n >= 1. It stays as it is.
            frame: what the other end knows too.
            memory: what `encode` returned here in the client's last round that counted, zero where masks have grown since;
                None at first, and for a broadcast.

        Returns:
            The sections, and what the client keeps, float32 of shape (n,); None: nothing.
        """
        raise NotImplementedError

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read what `encode` wrote, float32 of shape (n,). WireError for what it did not write."""
        raise NotImplementedError

    def nominal_bits(self, frame: Frame) -> float | None:
        """Return the bits that the paper's formula says a vector takes; None: it has none."""
        return None

    # ---- at the server: what one that looks at more than one reply does besides

    def start(self, clients: int, size: int) -> Any:
        """Return the server's memory before round 1, a value that a state can hold.

        Args:
            clients: of the federation.
            size: trained numbers of the model.

        Raises:
            UsageError: it would take more than the settings allow.
        """
        return None

    def announce(self, memory: Any, cohort: Sequence[int]) -> Mapping[int, Mapping[str, int | float]]:
        """Return the numbers that each client of a cohort is told, by short names; they are `told` in both ends' frames."""
        return {}

    def survey(self, memory: Any, arrived: Mapping[int, Arrived]) -> Any:
        """Return what is known of a cohort once all its replies are here; only for those whose `caps.joint` says so.

        Their values may be looked at only where an estimate need not be right on average.
        """
        return None

    def estimate(self, reply: Arrived, memory: Any, cohort: Any) -> Tensor:
        """Decode the reply of one client with what the server knows, float32 of shape (n,)."""
        return self.decode(reply.parts, reply.frame)

    def learn(self, reply: Arrived, memory: Any, cohort: Any) -> Any:
        """Return the server's memory after a reply that counted."""
        return memory

    def finish(self, memory: Any) -> Any:
        """Return the server's memory after a round."""
        return memory


def names() -> list[str]:
    """List the built-in compressors: the modules of this folder that hold one."""
    here = import_module("fedsieve.compress")
    return sorted(module.name for module in iter_modules(here.__path__) if module.name not in ("base", *SHARED))


SHARED = ("levels", "collisions")
"""modules of this folder that several compressors call"""


def find(name: str) -> type[Compressor]:
    """Return the class of settings of a compressor: a module of this folder, or `package.module:Class`.

    Raises:
        UsageError: no such compressor; the message names the nearest one.
    """
    if ":" in name:
        path, _, attribute = name.partition(":")
        try:
            found = getattr(import_module(path), attribute)
        except Exception as error:  # whatever stops the user's module
            raise UsageError(f"compressor {name!r} cannot be loaded: {type(error).__name__}: {error}.") from error
        if not (isinstance(found, type) and issubclass(found, Compressor)):
            raise UsageError(f"compressor {name!r} is no class derived from fedsieve.compress.base.Compressor.")
        return found
    if name not in names():
        raise UsageError(
            f"no compressor {name!r}.{nearest(name, names())} There are {', '.join(names())}, or your own as"
            " package.module:Class."
        )
    module = import_module(f"fedsieve.compress.{name}")
    return next(
        v
        for v in vars(module).values()
        if isinstance(v, type) and v.__module__ == module.__name__ and issubclass(v, Compressor)
    )


def name_of(compressor: Compressor) -> str:
    """Return the name that `find` finds a compressor by."""
    package, _, name = type(compressor).__module__.rpartition(".")
    return name if package == "fedsieve.compress" else f"{type(compressor).__module__}:{type(compressor).__qualname__}"
