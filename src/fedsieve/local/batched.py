"""Several clients trained in one batch, for networks so small that starting an operation takes as long as doing it.

The parameters of the clients are rows of one buffer, and their examples, one client after another, one batch: each layer
multiplies them by the weights of their own client (`fedsieve.local.perceptron`).

Results agree with training one by one up to rounding: parameters of a client to 1e-5 of the largest after a local epoch. Where
rounding takes the input of a ReLU across zero they part by more, as they do from a start that differs in the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.batches import Examples
from fedsieve.errors import FedsieveError
from fedsieve.local import perceptron
from fedsieve.local.executor import Executor, Trained, diverged
from fedsieve.local.forms import sparse_layers
from fedsieve.local.optim import Sgd, rate
from fedsieve.local.perceptron import Perceptron
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Masks, Params, finite
from fedsieve.reparam.base import Reparam
from fedsieve.settings import Local
from fedsieve.streams import Streams

TOLERANCE = 1e-5
"""largest difference from training one by one, over the largest parameter"""
LINE = 16
"""elements that rows of the buffers begin at multiples of: a cache line"""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A client's call of `Executor.train`: its arguments, in the same order."""

    params: Params
    examples: Examples
    order: NDArray[np.int64]
    streams: Streams
    masks: Masks | None = None
    epochs: int | None = None
    momentum: Tensor | None = None
    proximal: float = 0.0
    drift: Tensor | None = None
    moves: Tensor | None = None
    reparam: Reparam | None = None
    lr: float | None = None
    adam: bool = False
    purpose: str = "train"

    def alone(self, executor: Executor) -> Trained | FedsieveError:
        """Train this client by itself; return its error, if that is the client's own."""
        try:
            return executor.train(**{field.name: getattr(self, field.name) for field in fields(self)})
        except FedsieveError as error:
            return error

    @property
    def is_own(self) -> bool:
        """Whether its rule is so much its own that it is trained by itself."""
        return self.drift is not None or self.moves is not None or self.reparam is not None or self.adam

    def suits(self, other: Call) -> bool:
        """Whether two clients can be trained in one batch: on the same support, by the same rule, for as many epochs."""
        if self is other:
            return True
        rules = ((call.epochs, call.proximal, call.lr, call.streams.round, id(call.examples)) for call in (self, other))
        if len(set(rules)) > 1 or any(call.is_own for call in (self, other)):
            return False
        if self.masks is None or other.masks is None:
            return self.masks is other.masks
        return torch.equal(self.masks.kept, other.masks.kept)


class Batched:
    """Trains up to `group` clients in one batch; see `obstacle` for the models that it is for."""

    def __init__(self, executor: Executor, group: int) -> None:
        self._executor, self._group = executor, group
        self._stack: Stack | None = None

    def train(self, calls: Sequence[Call]) -> list[Trained | FedsieveError]:
        """Train clients, at most `group`; those that suit one another together. One that fails has its error for a result.

        Under masks that are sparse enough for sparse kernels, one by one.
        """
        found: dict[int, Trained | FedsieveError] = {}
        while rest := [place for place in range(len(calls)) if place not in found]:
            alike = [place for place in rest if calls[rest[0]].suits(calls[place])]
            some = [calls[place] for place in alike]
            results = self._together(some) if len(some) > 1 and not self._sparse(some[0].masks) else self._in_turn(some)
            found.update(zip(alike, results, strict=True))
        return [found[place] for place in range(len(calls))]

    def _sparse(self, masks: Masks | None) -> bool:
        return masks is not None and bool(sparse_layers(self._executor.spec.module, masks, self._executor.local))

    def _in_turn(self, calls: Sequence[Call]) -> list[Trained | FedsieveError]:
        return [call.alone(self._executor) for call in calls]

    def _together(self, calls: Sequence[Call]) -> list[Trained | FedsieveError]:
        executor = self._executor
        if self._stack is None:
            self._stack = Stack(executor.spec, executor.local, self._group)
        places = sorted(range(len(calls)), key=lambda place: -len(calls[place].order))
        ordered = [calls[place] for place in places]
        results = dict(zip(places, self._stack.train(ordered, executor.rounds), strict=True))
        masks, epochs = calls[0].masks, executor.local.epochs if calls[0].epochs is None else calls[0].epochs
        executor.flops += 3 * epochs * sum(len(call.order) for call in calls) * executor.forward_flops(masks)
        return [results[place] for place in range(len(calls))]


class Stack:
    """A network of linear layers, one row of parameters a client.

    Args:
        spec: a model to which there is no `obstacle`; its module is copied.
        local: settings of local training.
        group: number of rows.
    """

    def __init__(self, spec: ModelSpec, local: Local, group: int) -> None:
        self._local, self._layout = local, spec.layout
        size = spec.layout.size
        self._weights, self._gradient = (torch.zeros(group, -(-size // LINE) * LINE)[:, :size] for _ in range(2))
        views = (Params(spec.layout, flat) for flat in (self._weights, self._gradient))
        self._whole, self._parts = perceptron.perceptron(spec, *views), dict[tuple[int, int], Perceptron]()

    @torch.no_grad()
    def train(self, calls: Sequence[Call], rounds: int) -> list[Trained | FedsieveError]:
        """Train clients that suit one another, those with the most examples first; `rounds` is those of the run."""
        local, layout, first = self._local, self._layout, calls[0]
        weights, gradient = self._weights[: len(calls)], self._gradient[: len(calls)]
        velocity = torch.zeros_like(weights) if local.momentum else None
        for row, call in enumerate(calls):
            weights[row].copy_(call.params.flat)
            if velocity is not None and call.momentum is not None:
                velocity[row].copy_(call.momentum)
        support = None if first.masks is None else first.masks.kept.float()
        for vectors in (weights, velocity):
            if support is not None and vectors is not None:
                vectors[:, : layout.maskable].mul_(support)
        sizes = [len(call.order) for call in calls]
        lr = rate(local, first.streams.round, rounds) if first.lr is None else first.lr
        steps = list(_steps(sizes, local.batch))
        optims = {
            (rows.start, rows.stop): Sgd(
                local,
                lr,
                (weights[rows], []),
                (gradient[rows], []),
                None if velocity is None else velocity[rows],
                None if support is None else (support, []),
                first.proximal,
            )
            for rows, _, _ in steps
        }
        totals, predictions = torch.zeros(len(calls)), [0] * len(calls)
        epochs = local.epochs if first.epochs is None else first.epochs
        for epoch in range(epochs):
            orders = [
                call.order[call.streams(f"{call.purpose}/shuffle/{epoch}").permutation(len(call.order))] for call in calls
            ]
            for rows, begin, count in steps:
                chosen = np.concatenate([order[begin : begin + count] for order in orders[rows]])
                ((x, y),) = first.examples.epoch(chosen, len(chosen))
                optim = optims[rows.start, rows.stop]
                losses = self._of(rows).step(x, y, optim.direct)
                optim.move()
                each = y.numel() // len(losses)
                totals[rows].add_(losses, alpha=each)
                for row in range(rows.start, rows.stop):
                    predictions[row] += each
        means = [total / max(1, counted) for total, counted in zip(totals.tolist(), predictions, strict=True)]
        results: list[Trained | FedsieveError] = []
        for row, (call, mean_loss) in enumerate(zip(calls, means, strict=True)):
            if not isfinite(mean_loss) or not finite(weights[row]):
                results.append(diverged(call.streams, mean_loss))
                continue
            kept = None if velocity is None else velocity[row].clone()
            taken = epochs * -(-sizes[row] // local.batch)
            results.append(Trained(Params(layout, weights[row].clone()), sizes[row], mean_loss, kept, taken))
        return results

    def _of(self, rows: slice) -> Perceptron:
        """Return the network of some of the clients."""
        key = (rows.start, rows.stop)
        if key not in self._parts:
            self._parts[key] = self._whole.of(rows)
        return self._parts[key]


def obstacle(spec: ModelSpec, local: Local, examples: Examples) -> str | None:
    """Return why clients with this model cannot be trained in one batch, in a sentence; None if they can."""
    if examples.augment:
        return "Examples that are augmented (data.augment) are not trained on in one batch."
    return perceptron.obstacle(spec, local)


def _steps(sizes: Sequence[int], batch: int) -> Iterator[tuple[slice, int, int]]:
    """Yield (rows, begin, examples): the steps of an epoch, taken together by rows that have as many examples left for it.

    With the largest clients first these always stand side by side.
    """
    for begin in range(0, max(sizes), batch):
        row = 0
        for count, alike in groupby(min(batch, size - begin) for size in sizes if size > begin):
            rows = slice(row, row + len(list(alike)))
            yield rows, begin, count
            row = rows.stop
