"""The client's executor: one module bound to flat buffers, used for one client after another.

The module's parameters are views of one flat vector, gradients of another, so an optimiser step is a few vector operations
however many tensors the model has. Inside the executor convolution weights are stored with the channels last, which is what CPU
kernels are fastest on; everything that goes in and out is in the order of the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsieve.data.batches import Examples
from fedsieve.errors import Diverged
from fedsieve.local.convolution import accelerate
from fedsieve.local.optim import Sgd, rate
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Kind, Layout, Masks, Params, Slot, finite
from fedsieve.settings import Local
from fedsieve.streams import Stream, Streams

EVALUATION_BATCH = 128
"""examples per forward pass of an evaluation; shards of an evaluation start at multiples of it"""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What local training returns."""

    params: Params
    examples: int
    """training examples that the client holds"""
    loss: float
    """mean training loss over the steps of all epochs"""
    momentum: Tensor | None
    """velocity after the last step, shape (layout.trainable,); None without momentum"""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Counts of an evaluation; they add up."""

    correct: int
    loss: float
    """summed over the predictions"""
    predictions: int

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.correct + other.correct, self.loss + other.loss, self.predictions + other.predictions)

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, in [0, 1]."""
        return self.correct / max(1, self.predictions)

    @property
    def mean_loss(self) -> float:
        """Loss per prediction."""
        return self.loss / max(1, self.predictions)


class Executor:
    """Trains and evaluates a model on one device. Results depend only on the arguments of a call, never on earlier calls.

    Args:
        spec: the model; its module is copied.
        local: settings of local training.
        rounds: rounds of the whole run, for the learning-rate schedule.
    """

    def __init__(self, spec: ModelSpec, local: Local, rounds: int) -> None:
        self.spec, self.local, self.rounds = spec, local, rounds
        self.device = torch.device(local.device)
        self.flops = 0
        """floating-point operations spent in training since the last reset, masks respected, backward as twice forward"""
        layout = spec.layout
        self._module = deepcopy(spec.module).to(self.device)
        if local.convolution == "fast" and self.device.type == "cpu":
            accelerate(self._module)
        self._module.train()
        self._weights = torch.zeros(layout.size, device=self.device)
        self._gradient = torch.zeros(layout.trainable, device=self.device)
        trained = [slot for slot in layout.slots if slot.kind is not Kind.BUFFER]
        self._images = [(slice(*layout.spans[slot.name]), slot.shape) for slot in trained if len(slot.shape) == 4]
        self._parameters = _bind(self._module, layout, self._weights)
        self._weight_views = [parameter.data for parameter in self._parameters]
        self._gradient_views = _views(layout, self._gradient, trained)
        self._counters = [b for b in self._module.buffers() if not b.is_floating_point() and b.dim() == 0]

    def train(
        self,
        params: Params,
        examples: Examples,
        order: NDArray[np.int64],
        streams: Streams,
        *,
        masks: Masks | None = None,
        epochs: int | None = None,
        momentum: Tensor | None = None,
        proximal: float = 0.0,
        purpose: str = "train",
    ) -> Trained:
        """Train from `params` on the examples `order` names. See `Client.train`."""
        local, layout = self.local, self.spec.layout
        epochs = local.epochs if epochs is None else epochs
        support = None
        self._load(params)
        if masks is not None:
            support = self._inward(masks.kept.float())
            self._weights[: layout.maskable].mul_(support)
        velocity = self._velocity(momentum, support)
        weights = (self._weights[: layout.trainable], self._weight_views)
        gradient = (self._gradient, self._gradient_views)
        mask = None if support is None else (support, _views(layout, support, layout.masked_slots))
        optim = Sgd(local, rate(local, streams.round, self.rounds), weights, gradient, velocity, mask, proximal)
        total, predictions = torch.zeros((), device=self.device), 0
        self._mode(training=True)
        for counter in self._counters:
            counter.zero_()
        with _torch_stream(streams(f"{purpose}/torch"), self.device):
            for epoch in range(epochs):
                shuffled = order[streams(f"{purpose}/shuffle/{epoch}").permutation(len(order))]
                augment = streams(f"{purpose}/augment/{epoch}") if examples.augment else None
                for x, y in examples.epoch(shuffled, local.batch, augment):
                    with self._arithmetic():
                        loss = self.spec.loss(self._module(x), y)
                    optim.step(torch.autograd.grad(loss, self._parameters, materialize_grads=True))
                    total.add_(loss.detach(), alpha=y.numel())
                    predictions += y.numel()
        self.flops += 3 * epochs * len(order) * self._forward_flops(masks)
        mean_loss = float(total) / max(1, predictions)
        if not isfinite(mean_loss) or not finite(self._weights):
            raise Diverged(f"client {streams.client}, round {streams.round}: the training loss is {mean_loss}")
        kept = None if velocity is None else self._outward(velocity)
        return Trained(Params(layout, self._outward(self._weights)), len(order), mean_loss, kept)

    @torch.no_grad()
    def evaluate(self, params: Params, examples: Examples, order: NDArray[np.int64]) -> Metrics:
        """Evaluate `params` on the examples `order` names, in evaluation mode."""
        self._load(params)
        self._mode(training=False)
        correct, losses = [], []
        for x, y in examples.epoch(order, EVALUATION_BATCH):
            with self._arithmetic():
                outputs = self._module(x)
                losses.append(self.spec.loss(outputs, y) * y.numel())
            correct.append((outputs.argmax(-1) == y).sum())
        if not losses:
            return Metrics(0, 0.0, 0)
        predictions = len(order) * examples.y[0].numel()
        return Metrics(int(torch.stack(correct).sum()), float(torch.stack(losses).double().sum()), predictions)

    def _mode(self, *, training: bool) -> None:
        """Set training or evaluation mode, if it is the other: visiting all layers takes as long as part of a small step."""
        if self._module.training is not training:
            self._module.train(training)

    def _load(self, params: Params) -> None:
        self._weights.copy_(self._inward(params.flat))

    def _inward(self, flat: Tensor) -> Tensor:
        """From the order of the layout to that of the executor, on its device; all of the vector or its first parts."""
        flat = flat.to(self.device)
        moved = flat.clone() if self._images else flat
        for span, shape in self._images:
            if span.stop <= len(flat):
                _view(moved[span], shape).copy_(flat[span].view(shape))
        return moved

    def _outward(self, flat: Tensor) -> Tensor:
        """Back, as a new tensor in main memory."""
        moved = flat.clone()
        for span, shape in self._images:
            if span.stop <= len(flat):
                moved[span].view(shape).copy_(_view(flat[span], shape))
        return moved.cpu()

    def _velocity(self, momentum: Tensor | None, support: Tensor | None) -> Tensor | None:
        if not self.local.momentum:
            return None
        velocity = torch.zeros_like(self._gradient)
        if momentum is not None:
            velocity.copy_(self._inward(momentum))
            if support is not None:
                velocity[: len(support)].mul_(support)
        return velocity

    def _forward_flops(self, masks: Masks | None) -> int:
        return self.spec.density_flops(masks) if masks is not None else sum(self.spec.flops.values())

    def _arithmetic(self) -> AbstractContextManager[object]:
        if self.local.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


class Client:
    """What a method may touch on the client's side: its id, its data through the executor, its random streams."""

    def __init__(
        self,
        id: int,
        executor: Executor,
        train: Examples,
        part: NDArray[np.int64],
        test: Examples,
        share: NDArray[np.int64],
        streams: Streams,
    ) -> None:
        self.id, self.stream, self.rounds = id, streams, executor.rounds
        self._executor, self._train, self._part, self._test, self._share = executor, train, part, test, share

    @property
    def examples(self) -> int:
        """Training examples that the client holds."""
        return len(self._part)

    @property
    def layout(self) -> Layout:
        """Layout of the model."""
        return self._executor.spec.layout

    def train(
        self,
        params: Params,
        *,
        masks: Masks | None = None,
        epochs: int | None = None,
        momentum: Tensor | None = None,
        proximal: float = 0.0,
        purpose: str = "train",
    ) -> Trained:
        """Train on the client's own examples by SGD as the section `local` says.

        Args:
            params: where training starts.
            masks: weights, gradients and momentum stay on this support after every step.
            epochs: passes over the data; default: the setting.
            momentum: velocity to start from, shape (layout.trainable,); default: zero.
            proximal: weight of (1/2)||w - params||^2 added to the loss.
            purpose: name of the random streams (order of the examples, dropout); another one for a second training in a round.

        Raises:
            Diverged: the loss or a parameter is not finite.
        """
        return self._executor.train(
            params,
            self._train,
            self._part,
            self.stream,
            masks=masks,
            epochs=epochs,
            momentum=momentum,
            proximal=proximal,
            purpose=purpose,
        )

    def evaluate(self, params: Params) -> Metrics:
        """Evaluate on the client's own test examples."""
        return self._executor.evaluate(params, self._test, self._share)


def _bind(module: nn.Module, layout: Layout, weights: Tensor) -> list[nn.Parameter]:
    """Make the module's tensors views of the flat vector; return those that are trained, in order."""
    parameters = []
    for slot in layout.slots:
        begin, end = layout.spans[slot.name]
        path, _, leaf = slot.name.rpartition(".")
        owner = module.get_submodule(path)
        if slot.kind is Kind.BUFFER:
            owner._buffers[leaf] = weights[begin:end].view(slot.shape)
            continue
        parameter: nn.Parameter = getattr(owner, leaf)
        parameter.data = _view(weights[begin:end], slot.shape)
        parameters.append(parameter)
    return parameters


def _views(layout: Layout, flat: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
    """Views of a flat vector, one a slot."""
    return [_view(flat[slice(*layout.spans[slot.name])], slot.shape) for slot in slots]


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) != 4:
        return flat.view(shape)
    outputs, inputs, height, width = shape
    return flat.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


@contextmanager
def _torch_stream(stream: Stream, device: torch.device) -> Iterator[None]:
    """Draw torch's own random numbers (dropout) from a stream, and leave the global state as it was.

    Only this device's generator is touched: `torch.manual_seed` would visit every backend, which takes longer than a step.
    """
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    before = generator.get_state()
    generator.manual_seed(stream.word())
    try:
        yield
    finally:
        generator.set_state(before)
