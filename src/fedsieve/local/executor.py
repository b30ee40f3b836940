"""The client's executor: one module bound to flat buffers, used for one client after another.

The module's parameters are views of one flat vector, gradients of another, so an optimiser step is a few vector operations
however many tensors the model has. What the vectors hold and in which order depends on the masks, see `fedsieve.local.forms`;
everything that goes in and out is in the order of the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsieve.data.batches import Examples
from fedsieve.errors import Diverged
from fedsieve.local.forms import Form, Kept, Shrunk, Whole, sparse_layers
from fedsieve.local.optim import Sgd, rate
from fedsieve.models.compact import compact
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Layout, Masks, Params, finite
from fedsieve.settings import Local
from fedsieve.streams import Stream, Streams

FORMS = 2
"""masks whose forms are kept: those of the round's training, and of an evaluation"""
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
        self._forms: list[tuple[Tensor, Tensor | None, Form]] = []

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
        form = self._form(masks, params if momentum is None else None)
        bound = form.bound
        support = form.support(masks) if masks is not None else None
        velocity = None
        if local.momentum:
            velocity = torch.zeros_like(bound.gradient) if momentum is None else form.inward(momentum).clone()
        bound.weights.copy_(form.inward(params.flat))
        for vector in (bound.weights, velocity):
            if support is not None and vector is not None:
                vector[: len(support[0])].mul_(support[0])
        weights = (bound.weights[: bound.trainable], bound.weight_views)
        gradient = (bound.gradient, bound.gradient_views)
        optim = Sgd(local, rate(local, streams.round, self.rounds), weights, gradient, velocity, support, proximal)
        total, predictions = torch.zeros((), device=self.device), 0
        with self._steps(form, optim, streams, purpose) as step:
            for epoch in range(epochs):
                shuffled = order[streams(f"{purpose}/shuffle/{epoch}").permutation(len(order))]
                augment = streams(f"{purpose}/augment/{epoch}") if examples.augment else None
                for x, y in examples.epoch(shuffled, local.batch, augment):
                    total.add_(step(x, y), alpha=y.numel())
                    predictions += y.numel()
        self.flops += 3 * epochs * len(order) * self.forward_flops(masks)
        mean_loss = float(total) / max(1, predictions)
        if not isfinite(mean_loss) or not finite(bound.weights):
            raise diverged(streams, mean_loss)
        kept = None if velocity is None else form.outward(velocity, torch.zeros(layout.trainable))
        return Trained(Params(layout, form.outward(bound.weights, params.flat)), len(order), mean_loss, kept)

    @contextmanager
    def _steps(self, form: Form, optim: Sgd, streams: Streams, purpose: str) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Give what takes a step of training on a batch and returns the loss before it."""
        if (perceptron := form.perceptron) is not None:  # it draws no random numbers

            def written(x: Tensor, y: Tensor) -> Tensor:
                loss = perceptron.step(x, y, optim.direct)
                optim.move()
                return loss

            with torch.no_grad():
                yield written
            return
        bound = form.bound

        def recorded(x: Tensor, y: Tensor) -> Tensor:
            with self._arithmetic():
                loss = self.spec.loss(form.module(x), y)
            optim.step(torch.autograd.grad(loss, bound.parameters, materialize_grads=True))
            return loss.detach()

        _mode(form.module, training=True)
        for counter in bound.counters:
            counter.zero_()
        with _torch_stream(streams(f"{purpose}/torch"), self.device):
            yield recorded

    @torch.no_grad()
    def evaluate(self, params: Params, examples: Examples, order: NDArray[np.int64], masks: Masks | None = None) -> Metrics:
        """Evaluate `params`, zero where the masks are, on the examples `order` names, in evaluation mode."""
        form = self._form(masks)
        form.bound.weights.copy_(form.inward(params.flat))
        _mode(form.module, training=False)
        correct, losses = [], []
        for x, y in examples.epoch(order, EVALUATION_BATCH):
            with self._arithmetic():
                outputs = form.module(x)
                losses.append(self.spec.loss(outputs, y) * y.numel())
            correct.append((outputs.argmax(-1) == y).sum())
        if not losses:
            return Metrics(0, 0.0, 0)
        predictions = len(order) * examples.y[0].numel()
        return Metrics(int(torch.stack(correct).sum()), float(torch.stack(losses).double().sum()), predictions)

    def _form(self, masks: Masks | None, start: Params | None = None) -> Form:
        """Return the form to work on under masks; the last ones are kept, since the clients of a round share them.

        Args:
            masks: the masks, if any.
            start: what training starts from, without a velocity: then dead units may be left out.
        """
        if masks is None:
            return self._all
        flat = start.flat if start is not None and self.local.compact else None
        for kept, known, form in self._forms:
            if torch.equal(kept, masks.kept) and (
                flat is None if known is None else flat is not None and torch.equal(known, flat)
            ):
                return form
        form = self._made(self.spec, masks)
        if start is not None and flat is not None:
            small = compact(self.spec, start, masks, training=True)
            if small.spec.layout.size < self.spec.layout.size:
                form = Shrunk(small, masks, self._made(small.spec, small.shrink_masks(masks)))
        self._forms = [(masks.kept.clone(), None if flat is None else flat.clone(), form), *self._forms[: FORMS - 1]]
        return form

    def _made(self, spec: ModelSpec, masks: Masks) -> Form:
        sparse = self.device.type == "cpu" and self.local.precision == "fp32"
        if names := sparse_layers(spec.module, masks, self.local) if sparse else []:
            return Kept(spec, masks, names)
        return self._all if spec is self.spec else Whole(spec, self.local)

    @cached_property
    def _all(self) -> Form:
        """The form of all weights."""
        return Whole(self.spec, self.local)

    def forward_flops(self, masks: Masks | None) -> int:
        """Floating-point operations of one example's forward pass."""
        return self.spec.density_flops(masks) if masks is not None else sum(self.spec.flops.values())

    def _arithmetic(self) -> AbstractContextManager[object]:
        if self.local.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


class Client:
    """What a method may touch on the client's side: its id, its data through the executor, its random streams.

    `train_by` stands in for `executor.train` where clients are trained together.
    """

    def __init__(
        self,
        id: int,
        executor: Executor,
        train: Examples,
        part: NDArray[np.int64],
        test: Examples,
        share: NDArray[np.int64],
        streams: Streams,
        train_by: Callable[..., Trained] | None = None,
    ) -> None:
        self.id, self.stream, self.rounds = id, streams, executor.rounds
        self._executor, self._train, self._part, self._test, self._share = executor, train, part, test, share
        self._train_by = train_by or executor.train

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
        return self._train_by(
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

    def evaluate(self, params: Params, masks: Masks | None = None) -> Metrics:
        """Evaluate on the client's own test examples, `params` being zero where the masks are."""
        return self._executor.evaluate(params, self._test, self._share, masks)


def diverged(streams: Streams, mean_loss: float) -> Diverged:
    """Return the error of a client whose loss or parameters are not finite."""
    return Diverged(f"client {streams.client}, round {streams.round}: the training loss is {mean_loss}")


def _mode(module: nn.Module, *, training: bool) -> None:
    """Set training or evaluation mode, if it is the other: visiting all layers takes as long as part of a small step."""
    if module.training is not training:
        module.train(training)


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
