"""Starting weights drawn from named streams, equal to the bit on every platform.

A server and a client that share the seed make the same model, so it need not travel. Slot s is drawn from the stream
"init/<name of s>" alone: it does not depend on the other slots, nor on their order. A draw is b * (2u - 1), computed in
float64 from u uniform in [0, 1) and rounded once to float32; |w| <= b.

The bound b follows from the shape (out, in, k1, k2, ...) of a weight, with k = k1 * k2 * ...:

    fan_in = in * k        fan_out = out * k

A recurrent weight is one matrix with its gates stacked, (gates * hidden, inputs), so fan_out counts every gate. The weight
of a transposed convolution, (in, out, k1, ...), is read the same way as the others, as torch.nn.init does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod, sqrt

import torch
from torch import Tensor

from fedsieve.params import Kind, Layout, Params, Slot
from fedsieve.streams import Streams

EMBEDDING_BOUND = sqrt(3)
"""bound of the entries of a lookup table: their variance is 1, which is what the layer that reads them is scaled for"""


def kaiming_uniform(layout: Layout, streams: Streams, *, embeddings: Collection[str] = ()) -> Params:
    """Draw weights from U(-b, b) with b = sqrt(6 / fan_in), for layers followed by ReLU.

    Source: He et al. 2015, arXiv 1502.01852, eq. 10. Biases are 0, the forget gate's of an LSTM included; normalisation
    starts as the identity (scale 1, shift 0, running mean 0, running variance 1), and any other statistic at 0.

    Args:
        layout: the slots to fill.
        streams: the family that the draws come from; both ends of a wire must use the same seed, round and client.
        embeddings: names of lookup tables of shape (tokens, width). They have no fan: U(-sqrt(3), sqrt(3)).
    """
    return _draw(layout, streams, embeddings, _kaiming)


def kaiming_slot(slot: Slot, streams: Streams) -> Tensor:
    """Return what `kaiming_uniform` fills one slot with, which is no lookup table; float32 of the slot's shape."""
    return _drawn(slot, streams, (), _kaiming)


def glorot_uniform(layout: Layout, streams: Streams, *, embeddings: Collection[str] = ()) -> Params:
    """Draw weights from U(-b, b) with b = sqrt(6 / (fan_in + fan_out)).

    Source: Glorot and Bengio 2010, AISTATS, eq. 16. The rest is as in `kaiming_uniform`.
    """
    return _draw(layout, streams, embeddings, lambda fan_in, fan_out: sqrt(6 / (fan_in + fan_out)))


def _kaiming(fan_in: int, fan_out: int) -> float:
    return sqrt(6 / fan_in)


def _draw(layout: Layout, streams: Streams, embeddings: Collection[str], bound: Callable[[int, int], float]) -> Params:
    params = Params.zeros(layout)
    for slot in layout.slots:
        params[slot.name].copy_(_drawn(slot, streams, embeddings, bound))
    return params


def _drawn(slot: Slot, streams: Streams, embeddings: Collection[str], bound: Callable[[int, int], float]) -> Tensor:
    if slot.kind is not Kind.WEIGHT:
        return torch.full(slot.shape, float(_starts_at_one(slot)))
    b = EMBEDDING_BOUND if slot.name in embeddings else bound(*_fans(slot))
    u = streams(f"init/{slot.name}").uniform(slot.numel)
    return torch.from_numpy(b * (2 * u - 1)).float().view(slot.shape)


def _fans(slot: Slot) -> tuple[int, int]:
    kernel = prod(slot.shape[2:])
    return prod(slot.shape[1:2]) * kernel, prod(slot.shape[:1]) * kernel


def _starts_at_one(slot: Slot) -> bool:
    last = slot.name.rpartition(".")[2]
    return (slot.kind is Kind.NORM and last != "bias") or (slot.kind is Kind.BUFFER and last == "running_var")
