"""Masks that change while a federation goes on, sent to each client as far as it does not hold them.

A client that holds the current masks is sent none; one that holds those before them, the places that changed; any other the
whole. The server goes by what it knows: a client holds what it was sent when its reply came. So a client keeps the masks it was
sent last and those that the server knows of, which differ if a reply was lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsieve.params import Masks
from fedsieve.wire.message import Message, Reason, Section, WireError
from fedsieve.wire.sections import mask, number


@dataclass(frozen=True, slots=True)
class Versions:
    """The server's end; a part of a method's state."""

    masks: Masks
    """the current ones"""
    before: Masks | None
    """the ones before them; None: there were none"""
    version: int
    """of the current ones: 1, 2, ..."""
    held: Tensor
    """version that each client holds, 0 for none; int32 of shape (clients,)"""

    @classmethod
    def start(cls, masks: Masks, clients: int) -> Versions:
        """Begin with masks that no client holds."""
        return cls(masks, None, 1, torch.zeros(clients, dtype=torch.int32))

    def changed(self, masks: Masks) -> Versions:
        """Go on with other masks; nothing happens if they are the same."""
        if torch.equal(masks.kept, self.masks.kept):
            return self
        return replace(self, masks=masks, before=self.masks, version=self.version + 1)

    def answered(self, clients: Iterable[int]) -> Versions:
        """Note that clients hold the current masks, for they answered."""
        held = self.held.clone()
        held[torch.tensor(list(clients), dtype=torch.int64)] = self.version
        return replace(self, held=held)

    def sections(self, clients: Sequence[int]) -> dict[int, Mapping[str, Section]]:
        """Return the sections that tell each client the current masks; clients that lack the same get the same object."""
        made: dict[int, Mapping[str, Section]] = {}
        found = {}
        for client in clients:
            base = int(self.held[client])
            base = base if base >= self.version - 1 and (base == self.version or self.before is not None) else 0
            if base not in made:
                made[base] = {"version": number(self.version), "base": number(base)} | self._mask(base)
            found[client] = made[base]
        return found

    def messages(self, kind: str, round: int, clients: Sequence[int], sections: Mapping[str, Section]) -> dict[int, Message]:
        """Return a message to each client: the current masks as far as it lacks them, and the same `sections` for all."""
        told = self.sections(clients)
        made = {id(each): Message(kind, round, self.masks.layout, {**each, **sections}) for each in told.values()}
        return {client: made[id(each)] for client, each in told.items()}

    def _mask(self, base: int) -> dict[str, Section]:
        if base == self.version:
            return {}
        if base and self.before is not None:
            return {"mask": mask(Masks(self.masks.layout, self.masks.kept ^ self.before.kept))}
        return {"mask": mask(self.masks)}


@dataclass(frozen=True, slots=True)
class Known:
    """A client's end; a part of what it keeps."""

    masks: Mapping[int, Masks]
    """by version: those of its last request, and those that the server then knew it to hold"""

    @classmethod
    def told(cls, request: Message, before: Known | None) -> tuple[Masks, Known]:
        """Read the masks of a request; return them and what is known from now on.

        Raises:
            WireError: RANGE for masks relative to ones that are not here.
        """
        version, base = int(request.number("version")), int(request.number("base"))
        held = before.masks if before is not None else {}
        if base and base not in held:
            raise WireError(Reason.RANGE, 0, f"the masks are relative to version {base}, known here: {sorted(held)}")
        if base == version:
            masks = held[version]
        else:
            masks = request.mask("mask")
            if base:
                masks = Masks(masks.layout, masks.kept ^ held[base].kept)
        return masks, cls({base: held[base], version: masks} if base else {version: masks})
