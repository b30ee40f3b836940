"""Networks that both ends draw and prune by themselves, by the same rule from the same seed.

The server sends a seed and a hash of weights and mask, 16 bytes. Weights are equal to the bit everywhere, scores to prune by
are not: a client whose hash is another says so, and is sent the mask. The server goes by what it knows: a client holds the
network once its reply came; one that has lost it says so too, and is told anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedsieve.errors import DataError
from fedsieve.params import Masks, Params
from fedsieve.wire.message import Message, Reason, Section, WireError
from fedsieve.wire.sections import mask, number, seed

NOTHING, SEED, MASK = 0, 1, 2
"""what a client lacks"""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The server's end; a part of a method's state."""

    seed: int
    masks: Masks
    digest: int
    """hash of weights and mask"""
    lacks: Tensor
    """what each client lacks, as far as is known; uint8 of shape (clients,)"""

    @classmethod
    def start(cls, seed: int, weights: Params, masks: Masks, clients: int, sent: Literal["seed", "mask"]) -> Drawn:
        """Begin with a network that no client holds, of which seed or mask is sent first."""
        lacks = torch.full((clients,), SEED if sent == "seed" else MASK, dtype=torch.uint8)
        return cls(seed, masks, digest(weights, masks), lacks)

    def sections(self, lack: int) -> dict[str, Section]:
        """Return what a client is sent that lacks this."""
        sections = {"seed": seed(self.seed), "digest": seed(self.digest)} if lack else {}
        return sections | ({"mask": mask(self.masks)} if lack == MASK else {})

    def answered(self, found: Mapping[int, int]) -> Drawn:
        """Note what clients lack that answered."""
        lacks = self.lacks.clone()
        for client, lack in found.items():
            lacks[client] = lack
        return replace(self, lacks=lacks)


@dataclass(frozen=True, slots=True)
class Held:
    """A client's end; a part of what it keeps."""

    seed: int
    masks: Masks

    @classmethod
    def told(
        cls, request: Message, before: Held | None, weigh: Callable[[int], Params], prune: Callable[[int], Masks]
    ) -> Held | int:
        """Read what a request says of the network; return what the client then holds, or what it lacks.

        Args:
            request: with the sections of `Drawn`.
            before: what the client held.
            weigh: draws the weights of a seed.
            prune: makes the masks of a seed; called only if the client holds none.

        Raises:
            DataError: with the server's own mask the hash is another too, so the weights are.
        """
        if "seed" not in request.sections:
            return SEED if before is None else before
        word, sent = request.seed("seed"), "mask" in request.sections
        known = before is not None and before.seed == word
        held = cls(word, request.mask("mask") if sent else before.masks if before is not None and known else prune(word))
        if digest(weigh(word), held.masks) == request.seed("digest"):
            return held
        if sent:
            raise DataError("the weights drawn here from the seed are other ones than the server's.")
        return MASK


def lacking(request: Message, lack: int) -> Message:
    """Return the reply of a client that cannot take part."""
    return Message("setup", request.round, request.layout, {"lacks": number(lack)})


def read_lack(reply: Message) -> int:
    """Read what a client lacks: NOTHING for an ordinary reply. WireError: RANGE."""
    if reply.kind != "setup":
        return NOTHING
    if (lack := reply.number("lacks")) not in (SEED, MASK):
        raise WireError(Reason.RANGE, 0, f"a client lacks {lack}, not {SEED} or {MASK}")
    return int(lack)


def digest(weights: Params, masks: Masks) -> int:
    """Hash weights, as far as they are kept, and masks to 64 bits."""
    bits = np.packbits(masks.kept.numpy(), bitorder="little").tobytes()
    floats = weights.under(masks).flat.numpy().astype("<f4").tobytes()
    return int.from_bytes(blake2b(bits + floats, digest_size=8).digest(), "little")
