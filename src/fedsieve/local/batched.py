"""Several clients trained in one batch, for networks so small that starting an operation takes as long as doing it.

The parameters of the clients are rows of one buffer, and their examples, one client after another, one batch. The module takes
it as any batch; only its linear layers tell the clients apart, each multiplying its own examples by its own weights. In the
backward pass a layer writes the gradients of all clients into the buffer of gradients, and under the plain rule (no momentum,
weight decay or proximal term) moves the weights by them at once: the gradients are never in memory.

Results agree with training one by one up to rounding: parameters of a client to 1e-5 of the largest after a local epoch. Where
rounding takes the input of a ReLU across zero they part by more, as they do from a start that differs in the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsieve.data.batches import Examples
from fedsieve.errors import FedsieveError
from fedsieve.local.executor import Executor, Trained, diverged
from fedsieve.local.forms import sparse_layers
from fedsieve.local.optim import Sgd, rate
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Masks, Params, finite
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
    purpose: str = "train"

    def alone(self, executor: Executor) -> Trained | FedsieveError:
        """Train this client by itself; return its error, if that is the client's own."""
        try:
            return executor.train(
                self.params,
                self.examples,
                self.order,
                self.streams,
                masks=self.masks,
                epochs=self.epochs,
                momentum=self.momentum,
                proximal=self.proximal,
                purpose=self.purpose,
            )
        except FedsieveError as error:
            return error

    def suits(self, other: Call) -> bool:
        """Whether two clients can be trained in one batch: on the same support, by the same rule, for as many epochs."""
        rules = ((call.epochs, call.proximal, call.streams.round, id(call.examples)) for call in (self, other))
        if len(set(rules)) > 1:
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


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A linear layer of several clients, views of the buffers."""

    weight: Tensor
    """shape (clients, out, in)"""
    bias: Tensor | None
    """shape (clients, out)"""
    weight_gradient: Tensor
    bias_gradient: Tensor | None

    def of(self, rows: slice) -> _Layer:
        """Return the layer of some of the clients."""
        bias, gradient = (None if tensor is None else tensor[rows] for tensor in (self.bias, self.bias_gradient))
        return _Layer(self.weight[rows], bias, self.weight_gradient[rows], gradient)


class Stack:
    """A network of linear layers, one row of parameters a client.

    Args:
        spec: a model to which there is no `obstacle`; its module is copied.
        local: settings of local training.
        group: number of rows.
    """

    def __init__(self, spec: ModelSpec, local: Local, group: int) -> None:
        self._local, self._layout, self._loss = local, spec.layout, spec.loss
        self.module = deepcopy(spec.module).train()
        size = spec.layout.size
        self._weights, self._gradient = (torch.zeros(group, -(-size // LINE) * LINE)[:, :size] for _ in range(2))
        self._leaf = torch.zeros((), requires_grad=True)
        self._rows, self._lr = slice(0, group), 0.0
        weights, gradient = (Params(spec.layout, flat) for flat in (self._weights, self._gradient))
        for name, layer in self.linear().items():
            names = [f"{name}.{part}".removeprefix(".") for part in ("weight", "bias")]
            views = [params.get(key) for params in (weights, gradient) for key in names]
            layer.forward = partial(self._linear, _Layer(*views))  # type: ignore[method-assign,arg-type]

    def linear(self) -> dict[str, nn.Linear]:
        """The layers that tell the clients apart, by name."""
        layers = {name: layer for name, layer in self.module.named_modules() if type(layer) is nn.Linear}
        return {name: layer for name, layer in layers.items() if f"{name}.weight".removeprefix(".") in self._layout.named}

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
        lr, steps = rate(local, first.streams.round, rounds), list(_steps(sizes, local.batch))
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
        for epoch in range(local.epochs if first.epochs is None else first.epochs):
            orders = [
                call.order[call.streams(f"{call.purpose}/shuffle/{epoch}").permutation(len(call.order))] for call in calls
            ]
            for rows, begin, count in steps:
                chosen = np.concatenate([order[begin : begin + count] for order in orders[rows]])
                ((x, y),) = first.examples.epoch(chosen, len(chosen))
                losses = self._step(rows, x, y, lr, optims[rows.start, rows.stop])
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
            results.append(Trained(Params(layout, weights[row].clone()), sizes[row], mean_loss, kept))
        return results

    def _step(self, rows: slice, x: Tensor, y: Tensor, lr: float, optim: Sgd) -> Tensor:
        """Take a step of some clients with as many examples each; return their losses."""
        self._rows, self._lr = rows, lr if optim.plain else 0.0
        clients = rows.stop - rows.start
        outputs = self.module(x)
        pairs = zip(outputs.unflatten(0, (clients, -1)).unbind(), y.unflatten(0, (clients, -1)), strict=True)  # type: ignore[no-untyped-call]
        losses = torch.stack([self._loss(scores, targets) for scores, targets in pairs])
        torch.autograd.grad(losses, self._leaf, torch.ones_like(losses), allow_unused=True)
        optim.move()
        return losses.detach()

    def _linear(self, layer: _Layer, x: Tensor) -> Tensor:
        """Apply a layer to a batch with as many examples of each client, one client after another."""
        y: Tensor = _Linear.apply(x, self._leaf, layer.of(self._rows), self._lr)  # type: ignore[no-untyped-call]
        return y


class _Linear(torch.autograd.Function):
    """Linear layers of several clients, each on its own part of a batch.

    The backward pass computes the gradients of weights and biases in their buffers or, if `lr` is not 0, takes a step of SGD;
    so each layer is to be used once in a forward pass. `leaf` gets no gradient: it is there to have the backward pass run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, layer: _Layer, lr: float) -> Tensor:
        """Return x, shape (clients * examples, ..., in), times the weights, shape (clients * examples, ..., out)."""
        parts = x.reshape(len(layer.weight), -1, x.shape[-1])
        ctx.save_for_backward(parts)
        ctx.layer, ctx.lr, ctx.shape = layer, lr, x.shape
        across = layer.weight.transpose(1, 2)
        y = torch.bmm(parts, across) if layer.bias is None else torch.baddbmm(layer.bias[:, None], parts, across)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Return the gradient of x."""
        (parts,), layer, lr = ctx.saved_tensors, ctx.layer, ctx.lr
        g = gradients[0].reshape(*parts.shape[:2], -1)
        inward = torch.bmm(g, layer.weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        if lr:
            layer.weight.baddbmm_(g.transpose(1, 2), parts, alpha=-lr)
        else:
            layer.weight_gradient.baddbmm_(g.transpose(1, 2), parts, beta=0)
        if layer.bias is not None:
            if lr:
                layer.bias.sub_(g.sum(1), alpha=lr)
            else:
                layer.bias_gradient.copy_(g.sum(1))
        return inward, None, None, None


def obstacle(spec: ModelSpec, local: Local, examples: Examples) -> str | None:
    """Return why clients with this model cannot be trained in one batch, in a sentence; None if they can.

    What the kinds of layers do not tell, a trial does: two clients take a step together and one by one, on noise.
    """
    if local.device != "cpu" or local.precision != "fp32":
        return "Clients are trained in one batch on a CPU in fp32 only (local.device, local.precision)."
    if examples.augment:
        return "Examples that are augmented (data.augment) are not trained on in one batch."
    uses = Counter(id(tensor) for each in spec.module.modules() for tensor in each._parameters.values())
    for name in spec.layout.named:
        path, _, leaf = name.rpartition(".")
        owner = spec.module.get_submodule(path)
        if type(owner) is not nn.Linear or any(
            f"{path}.{key}".removeprefix(".") not in spec.layout.named for key in _held(owner)
        ):
            return f"{name} belongs to {type(owner).__name__}: in one batch only networks whose trained layers are all linear."
        if uses[id(getattr(owner, leaf))] > 1:
            return f"{name} is shared between layers, which one batch of several clients does not do."
    return _trial(spec, local, examples)


def _held(layer: nn.Module) -> list[str]:
    return [key for key, tensor in layer._parameters.items() if tensor is not None]


def _trial(spec: ModelSpec, local: Local, examples: Examples) -> str | None:
    executor, streams = Executor(spec, replace(local, lr=0.01, epochs=1), 1), Streams(0).at(round=1)
    rows = torch.arange(4) % len(examples)
    x, start = examples.x[rows], spec.initial("kaiming", streams)
    if spec.example.is_floating_point():
        x = torch.from_numpy(streams("trial").numpy().normal(size=x.shape).astype(np.float32))
    trial = Examples(x, examples.y[rows], (), ())
    calls = [Call(start, trial, np.arange(2 * client, 2 * client + 2), streams.at(client=client)) for client in (0, 1)]
    stack, before = Stack(spec, executor.local, 2), torch.default_generator.get_state()
    used: Counter[str] = Counter()
    for name, layer in stack.linear().items():
        layer.register_forward_hook(lambda *_, name=name: used.update([name]))
    try:
        together = stack.train(calls, 1)
    except Exception as error:  # whatever a module does with a batch that is not one client's
        return f"The network does not take the examples of several clients in one batch: {type(error).__name__}: {error}."
    if not torch.default_generator.get_state().equal(before):
        torch.default_generator.set_state(before)
        return "The network draws random numbers (dropout), which each client draws from a stream of its own."
    if odd := [name for name in stack.linear() if used[name] != 1]:
        return f"Layer {odd[0]} is used {used[odd[0]]} times in a forward pass; in one batch each is used once."
    for call, found in zip(calls, together, strict=True):
        alone = call.alone(executor)
        if isinstance(found, FedsieveError) or isinstance(alone, FedsieveError):
            return "The loss of the network is not finite on noise, so a batch of two clients cannot be tried."
        if float((found.params - alone.params).flat.abs().max()) > 10 * TOLERANCE * float(alone.params.flat.abs().max()):
            return "The network mixes the examples of a batch: in one batch with others a client learns something else."
    return None


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
