"""Examples held as tensors, who holds which, and batches of them.

An epoch is one gather of rows by index; normalisation and augmentation then run on blocks of whole batches that fit the
processor's cache, which is several times faster than over the whole epoch at once. Images are held with the channels last in
memory (the shape stays (N, C, H, W)): that is what convolutions on a CPU are fastest on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.datasets import Dataset, held_out
from fedsieve.data.partition import Parts, partition, sample, test_shares
from fedsieve.errors import DataError, UsageError
from fedsieve.settings import Data
from fedsieve.streams import Stream, Streams

BLOCK = 2**18
"""elements that are normalised at a time"""
PAD = 4
"""pixels of padding before a random crop"""


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Examples held as tensors on a device, normalised when they are batched."""

    x: Tensor
    """uint8 or float32 (N, C, H, W), float32 (N, ...), or int64 (N, T)"""
    y: Tensor
    """int64 (N,) or (N, T)"""
    mean: tuple[float, ...]
    """per channel, in units of the stored values; empty: not normalised"""
    std: tuple[float, ...]
    augment: bool = False
    """crop and mirror images at random where `epoch` is given a stream"""

    def __len__(self) -> int:
        return len(self.y)

    def epoch(
        self, order: NDArray[np.int64] | Tensor, batch: int, stream: Stream | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the examples that `order` names, in that order, in batches.

        Args:
            order: positions, shape (n,).
            batch: examples a batch, >= 1; the last may be smaller.
            stream: draws the augmentation, if these examples are augmented.

        Yields:
            x float32 (B, ...) normalised, or int64 (B, T) tokens as they are; images have channels-last strides.
            y int64 (B,) or (B, T). Batches may share memory with one another.
        """
        if isinstance(order, np.ndarray):  # torch warns of arrays that cannot be written
            index = torch.from_numpy(order) if order.flags.writeable else torch.tensor(order)
        else:
            index = order
        if not len(index):
            return
        index = index.to(self.x.device)
        images = self.x.dim() == 4
        rows = (self.x.permute(0, 2, 3, 1) if images else self.x).index_select(0, index)
        labels = self.y.index_select(0, index)
        shifts = _shifts(len(index), stream).to(rows.device) if self.augment and stream is not None else None
        scale = None
        if self.mean:
            repeats = prod(rows.shape[1:]) // len(self.mean)
            scale = _scale(self.mean, self.std, repeats, last=images, device=rows.device)
        size = batch * max(1, BLOCK // (batch * prod(rows.shape[1:])))
        for begin in range(0, len(index), size):
            block = rows[begin : begin + size]
            if shifts is not None:
                block = _shifted(block, shifts[begin : begin + size])
            if scale is not None:
                block = block.flatten(1).sub(scale[0]).div_(scale[1]).view(block.shape)
            elif block.dtype == torch.uint8:
                block = block.float()
            if images:
                block = block.permute(0, 3, 1, 2)
            yield from zip(torch.split(block, batch), torch.split(labels[begin : begin + size], batch), strict=True)


@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """Who holds which examples."""

    name: str
    classes: int
    train: Examples
    test: Examples
    parts: Sequence[NDArray[np.int64]]
    """training examples of each client"""
    shares: Sequence[NDArray[np.int64]]
    """test examples of each client"""
    natural: bool
    """the clients are the data's own"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.x.shape[1:])

    @property
    def tokens(self) -> bool:
        """Whether the examples are sequences of symbols."""
        return self.train.x.dtype == torch.int64

    def example(self) -> Tensor:
        """Return the first training example as a batch of one, as a model gets it."""
        return next(self.train.epoch(np.arange(1), 1))[0]

    def manifest(self) -> dict[str, Any]:
        """Describe who holds what: the number of clients, classes, the histogram, and a hash of the assignment."""
        digest = blake2b(digest_size=16)
        for indices in (*self.parts, *self.shares):
            digest.update(len(indices).to_bytes(8, "little") + indices.astype("<i8").tobytes())
        histogram = self.histogram().tolist()
        return {"clients": len(self.parts), "classes": self.classes, "histogram": histogram, "hash": digest.hexdigest()}

    def to(self, device: torch.device) -> Federation:
        """Return the same federation with its examples on a device."""
        train, test = (replace(part, x=part.x.to(device), y=part.y.to(device)) for part in (self.train, self.test))
        return replace(self, train=train, test=test)

    def histogram(self) -> NDArray[np.int64]:
        """Count training examples by client and class, shape (clients, classes); by client, (clients, 1), for token data."""
        if self.train.y.dim() > 1:
            return Parts.of(self.parts).sizes[:, None]
        return Parts.of(self.parts).histogram(self.train.y.cpu().numpy(), self.classes)


def federate(dataset: Dataset, settings: Data, streams: Streams) -> Federation:
    """Share out a data set among clients as the settings say.

    Raises:
        DataError: the partition asked for does not fit the data.
        UsageError: augmentation is asked for and the examples are not images; or nothing can be held out.
    """
    if settings.validation:
        dataset = held_out(dataset, settings.validation, streams("validation"))
    images = dataset.x_train.dim() == 4
    augment = settings.augment == "crop-flip"
    if augment and not images:
        raise UsageError(
            f"data.augment = crop-flip needs images (N, C, H, W); x_train of {dataset.name} has shape"
            f" {tuple(dataset.x_train.shape)}.\nSet data.augment = none."
        )
    sequences = dataset.y_train.dim() > 1
    if sequences and settings.partition in ("dirichlet", "shards", "classes"):
        raise DataError(
            f"data.partition = {settings.partition} needs one label an example; {dataset.name} has"
            f" {dataset.y_train.shape[1]} (one a symbol).\nUse data.partition = natural, iid, quantity or sample."
        )
    natural = settings.partition == "natural"
    owners_train = dataset.owner_train if natural else None
    owners_test = dataset.owner_test if natural else None
    labels, test_labels = _labels(dataset.y_train), _labels(dataset.y_test)
    parts = partition(labels, settings, streams, owners_train)
    if settings.partition == "sample":
        each = max(1, round(settings.examples * len(test_labels) / len(labels)))
        shares = sample(len(test_labels), settings.clients, each, streams("partition/shares"))
    else:
        shares = test_shares(test_labels, labels, parts, streams, owners_train=owners_train, owners_test=owners_test)
    x_train, x_test = dataset.x_train, dataset.x_test
    if images:
        x_train = x_train.contiguous(memory_format=torch.channels_last)
        x_test = x_test.contiguous(memory_format=torch.channels_last)
    return Federation(
        name=dataset.name,
        classes=dataset.classes,
        train=Examples(x_train, dataset.y_train, dataset.mean, dataset.std, augment),
        test=Examples(x_test, dataset.y_test, dataset.mean, dataset.std),
        parts=parts,
        shares=shares,
        natural=natural,
    )


def _labels(y: Tensor) -> NDArray[np.int64]:
    """One label an example; all alike where each has a sequence of them."""
    return y.numpy() if y.dim() == 1 else np.zeros(len(y), dtype=np.int64)


@lru_cache(maxsize=8)
def _scale(
    mean: tuple[float, ...], std: tuple[float, ...], repeats: int, last: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and std of each element of a flattened row, shape (elements,): a full row is one vector operation."""
    scale = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
    spread = (values.repeat(repeats) if last else values.repeat_interleave(repeats) for values in scale)
    first, second = spread
    return first, second


def _shifts(n: int, stream: Stream) -> Tensor:
    """Draw where each crop begins (row, column; 0 to 2 PAD) and whether it is mirrored, shape (n, 3) int64."""
    uniform = stream.uniform(3 * n).reshape(n, 3)
    return torch.from_numpy((uniform * np.array([2 * PAD + 1, 2 * PAD + 1, 2])).astype(np.int64))


def _shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Pad with zeros, crop to the old size and mirror left to right; images (n, H, W, C), shifts (n, 3)."""
    n, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    tall, wide = padded.shape[1:3]
    corner = (torch.arange(n, device=images.device) * tall + shifts[:, 0]) * wide + shifts[:, 1]
    row = corner[:, None] + wide * torch.arange(height, device=images.device)
    strips = padded.view(-1).unfold(0, width * channels, channels)  # one image row wide, beginning at each pixel
    cropped = strips.index_select(0, row.view(-1)).view(images.shape)
    return torch.where(shifts[:, 2, None, None, None] == 1, cropped.flip(2), cropped)
