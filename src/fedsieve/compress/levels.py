"""Stochastic rounding to evenly spaced levels, what several compressors share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.streams import Stream
from fedsieve.wire.bits import Reason, WireError


def buckets(sizes: Sequence[int], bucket: int) -> NDArray[np.int64]:
    """Return the lengths of the pieces that tensors of these sizes are cut into, at most `bucket` long; 0: a piece each."""
    if not bucket:
        return np.asarray(sizes, dtype=np.int64)
    return np.concatenate([np.diff(np.minimum(np.arange(0, size + bucket, bucket), size)) for size in sizes])


def scales(x: Tensor, lengths: NDArray[np.int64], norm: str) -> NDArray[np.float32]:
    """Return the norm of each piece, "l2" or "max", float32 of shape (pieces,), never less than the exact one where "max"."""
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    flat = x.numpy()
    if norm == "max":
        return np.maximum.reduceat(np.abs(flat), begins)
    return np.sqrt(np.add.reduceat(np.square(flat, dtype=np.float64), begins)).astype(np.float32)


def rounded(x: Tensor, lengths: NDArray[np.int64], norms: NDArray[np.float32], top: int, stream: Stream) -> NDArray[np.int32]:
    """Round each number to one of the multiples of its piece's norm / top around it, the nearer one more often.

    The mean of what it becomes is the number itself. Levels are in [-top, top] if no number exceeds its norm; a piece of norm 0
    has levels 0.
    """
    steps = np.divide(top, norms, out=np.zeros(len(norms), dtype=np.float64), where=norms > 0)
    scaled = x.numpy() * np.repeat(steps, lengths)
    levels: NDArray[np.int32] = np.clip(np.floor(scaled + stream.uniform(len(scaled))), -top, top).astype(np.int32)
    return levels


def restored(levels: Tensor, lengths: NDArray[np.int64], norms: Tensor, top: int) -> Tensor:
    """Return what levels stand for, float32. WireError: RANGE for a norm below 0."""
    if bool((norms < 0).any()):
        raise WireError(Reason.RANGE, 0, "a norm is below 0")
    steps = torch.from_numpy(np.repeat(norms.numpy().astype(np.float64) / top, lengths))
    return (levels.double() * steps).float()
