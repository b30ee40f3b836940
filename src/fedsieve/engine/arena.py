"""Memory shared with worker processes.

A block has no name: the kernel frees it when the last process that maps it ends, however that ends, so a killed run leaves
nothing behind.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from math import prod
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Arena:
    """A block of `nbytes` bytes that a spawned process sees too when it is handed over at its start.

    Pages are taken from the system when they are first written, so a generous size costs nothing.
    """

    def __init__(self, nbytes: int, fd: int | None = None) -> None:
        self.nbytes = max(1, nbytes)
        if fd is None:
            fd = _anonymous_file()
            os.ftruncate(fd, self.nbytes)
        self._fd = fd
        self.view = memoryview(mmap.mmap(fd, self.nbytes))

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (DupFd(self._fd), self.nbytes)

    def __del__(self) -> None:
        os.close(self._fd)


class SharedTensor:
    """A tensor whose elements are in an arena, with the strides of its source; pickled, only its place travels."""

    def __init__(self, source: Tensor, *, move: bool = False) -> None:
        """Copy a tensor into an arena; to `move`, have the source itself see the elements there, and let go of its own."""
        self._dtype, self._shape, self._stride = str(source.numpy().dtype), tuple(source.shape), source.stride()
        self._arena = Arena(source.numel() * source.element_size())
        shared = self.tensor().copy_(source)
        if move:
            source.set_(shared)  # type: ignore[call-overload]

    def tensor(self) -> Tensor:
        """Return the tensor; every process that calls this sees the same elements."""
        elements = torch.from_numpy(np.frombuffer(self._arena.view, dtype=self._dtype, count=prod(self._shape)))
        return elements.as_strided(self._shape, self._stride)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedsieve")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _attach(handle: Any, nbytes: int) -> Arena:
    return Arena(nbytes, handle.detach())
