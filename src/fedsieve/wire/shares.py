"""Shares and probabilities as a section: floats, or whole numbers of a few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.message import Message
from fedsieve.wire.sections import Section, integers, vector


def shares(values: Tensor, bits: int) -> Section:
    """Write numbers in [0, 1], float32 of shape (n,): the cell of 2**bits equal ones that each falls in.

    A cell is read as its middle, so the error is at most 2**-(bits + 1), and no number changes its side of 1/2: that itself is
    of the upper half. With 0 bits numbers are sent as they are, 32 bits each.
    """
    if not bits:
        return vector(values)
    cells = 2**bits
    return integers((values.double() * cells).floor().clamp(max=cells - 1).long())


def read_shares(message: Message, name: str, bits: int, n: int) -> Tensor:
    """Read what `shares` wrote with the same `bits`, float32 of shape (n,).

    Raises:
        WireError: COUNT for another number of them than n; RANGE for one outside of [0, 1].
    """
    found = ((message.integers(name).double() + 0.5) / 2**bits).float() if bits else read_floats(message, name, n)
    if found.numel() != n:
        raise WireError(Reason.COUNT, 0, f"{found.numel()} shares, not {n}")
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise WireError(Reason.RANGE, 0, f"section {name!r} holds a share outside of [0, 1]")
    return found


def read_floats(message: Message, name: str, n: int) -> Tensor:
    """Read a vector of n float32. WireError: COUNT for any other."""
    found = message.vector(name)
    if found.dtype != torch.float32 or found.numel() != n:
        raise WireError(Reason.COUNT, 0, f"section {name!r} holds {found.numel()} numbers of {found.dtype}, not {n} of 32 bits")
    return found
