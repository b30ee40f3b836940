"""The client's executor: one module bound to flat buffers, used for one client after another.

The module's parameters are views of one flat vector, gradients of another, so an optimiser step is a few vector operations
however many tensors the model has. What the vectors hold and in which order depends on the masks, see `fedsieve.local.forms`;
everything that goes in and out is in the order of the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from xxhash import xxh3_128_digest

from fedsieve.data.batches import Examples
from fedsieve.errors import Diverged
from fedsieve.local.forms import Form, Kept, Shrunk, Whole, sparse_layers
from fedsieve.local.optim import Sgd, gradient_weight, rate
from fedsieve.models.compact import compact
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Kind, Layout, Masks, Params, finite
from fedsieve.reparam.base import Reparam
from fedsieve.settings import Local
from fedsieve.sparsity.select import top
from fedsieve.streams import Stream, Streams

FORMS = 2
"""masks whose forms are kept: those of the round's training, and of an evaluation"""
EVALUATION_BATCH = 128
"""examples per forward pass of an evaluation; shards of an evaluation start at multiples of it"""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What local training returns."""

    params: Params
    """what was learned; with a reparametrisation not what the network computes with"""
    examples: int
    """training examples that the client holds"""
    loss: float
    """mean training loss over the steps of all epochs"""
    momentum: Tensor | None
    """velocity after the last step, shape (layout.trainable,); None without momentum"""
    steps: int
    """steps that were taken"""


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
        """floating-point operations since the last reset, masks respected, backward as twice forward: of training, and of what
        methods measure on training examples"""
        self._forms: list[tuple[bytes, Tensor | None, Form]] = []
        self._others: dict[bytes, Executor] = {}

    def of(self, spec: ModelSpec) -> Executor:
        """Return the executor of another network on the same device; networks are told apart by their layouts."""
        if spec.layout.fingerprint == self.spec.layout.fingerprint:
            return self
        return self._others.setdefault(spec.layout.fingerprint, Executor(spec, self.local, self.rounds))

    @property
    def total_flops(self) -> int:
        """Floating-point operations, other networks included."""
        return self.flops + sum(other.total_flops for other in self._others.values())

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
        drift: Tensor | None = None,
        moves: Tensor | None = None,
        reparam: Reparam | None = None,
        lr: float | None = None,
        adam: bool = False,
        purpose: str = "train",
    ) -> Trained:
        """Train from `params` on the examples `order` names. See `Client.train`."""
        local, layout = self.local, self.spec.layout
        epochs = local.epochs if epochs is None else epochs
        usual = momentum is None and drift is None and moves is None and reparam is None and not adam
        form = self._form(masks, params if usual else None)
        bound = form.bound
        support = form.support(masks) if masks is not None else None
        velocity = None
        if local.momentum and not adam:
            velocity = torch.zeros_like(bound.gradient) if momentum is None else form.inward(momentum).clone()
        bound.weights.copy_(form.inward(params.flat))
        for vector in (bound.weights, velocity):
            if support is not None and vector is not None:
                vector[: len(support[0])].mul_(support[0])
        seen = learned = bound.weights[: bound.trainable]
        mapped = None
        if reparam is not None:
            learned, bring = seen.clone(), _bringing(form, layout)
            mapped = (reparam.bound(bring, streams(f"{purpose}/reparam")), seen, len(bring(torch.zeros(layout.maskable))))
        optim = Sgd(
            local,
            rate(local, streams.round, self.rounds) if lr is None else lr,
            (learned, bound.weight_views),
            (bound.gradient, bound.gradient_views),
            velocity,
            support,
            proximal,
            drift=None if drift is None else form.inward(drift),
            moves=None if moves is None else form.inward(moves.float()),
            reparam=mapped,
            adam=adam,
        )
        total, predictions, steps = torch.zeros((), device=self.device), 0, 0
        with self._steps(form, optim, streams, purpose) as step:
            for epoch in range(epochs):
                shuffled = order[streams(f"{purpose}/shuffle/{epoch}").permutation(len(order))]
                augment = streams(f"{purpose}/augment/{epoch}") if examples.augment else None
                for x, y in examples.epoch(shuffled, local.batch, augment):
                    optim.begin()
                    total.add_(step(x, y), alpha=y.numel())
                    predictions += y.numel()
                    steps += 1
        self.flops += 3 * epochs * len(order) * self.forward_flops(masks)
        mean_loss = float(total) / max(1, predictions)
        if reparam is not None:
            seen.copy_(learned)
        if not isfinite(mean_loss) or not finite(bound.weights):
            raise diverged(streams, mean_loss)
        kept = None if velocity is None else form.outward(velocity, torch.zeros(layout.trainable))
        return Trained(Params(layout, form.outward(bound.weights, params.flat)), len(order), mean_loss, kept, steps)

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

    def gradients(
        self,
        params: Params,
        batches: Iterator[tuple[Tensor, Tensor]],
        masks: Masks | None = None,
        *,
        power: int = 1,
        training: bool = False,
        curvature: bool = False,
        temperature: float = 1.0,
        stream: Stream,
    ) -> Tensor:
        """Return the mean gradient over some batches, of pruned weights too. See `Client.gradients`."""
        form = self._recorded if curvature else self._all
        bound = form.bound
        bound.weights.copy_(form.inward((params if masks is None else params.under(masks)).flat))
        given = list(batches)
        _mode(form.module, training=training)

        def mean(of: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
            total, predictions = torch.zeros_like(bound.gradient), 0
            for x, y in given:
                loss = self.spec.loss(form.module(x) / temperature, y)
                torch._foreach_copy_(bound.gradient_views, of(loss))
                total.add_(bound.gradient.pow(power), alpha=y.numel())
                predictions += y.numel()
            return total.div_(max(1, predictions))

        def first(loss: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss, bound.parameters, materialize_grads=True)

        with _torch_stream(stream, self.device):
            found = mean(first)
            if curvature:
                along = torch.split(found, [view.numel() for view in bound.gradient_views])

                def second(loss: Tensor) -> tuple[Tensor, ...]:
                    slopes = torch.autograd.grad(loss, bound.parameters, create_graph=True, materialize_grads=True)
                    flat = (slope.permute(0, 2, 3, 1) if slope.dim() == 4 else slope for slope in slopes)
                    flow = torch.stack([slope.flatten() @ part for slope, part in zip(flat, along, strict=True)]).sum()
                    return torch.autograd.grad(flow, bound.parameters, materialize_grads=True)

                found = mean(second)
        self.flops += (9 if curvature else 3) * sum(len(y) for _, y in given) * self.forward_flops(None)
        return form.outward(found, torch.zeros(self.spec.layout.trainable))

    def top_gradients(
        self,
        params: Params,
        batch: tuple[Tensor, Tensor],
        masks: Masks,
        counts: Mapping[str, int],
        *,
        training: bool = False,
        stream: Stream,
        ties: Callable[[str], Stream],
    ) -> tuple[Tensor, Tensor]:
        """Return the steepest pruned weights of some slots. See `Client.top_gradients`."""
        form, layout, (x, y) = self._all, self.spec.layout, batch
        form.bound.weights.copy_(form.inward(params.under(masks).flat))
        _mode(form.module, training=training)
        named = dict(zip((s.name for s in layout.slots if s.kind is not Kind.BUFFER), form.bound.parameters, strict=True))
        found: dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}

        def reduce(name: str, gradient: NDArray[np.float32]) -> None:
            kept = masks[name].flatten().numpy()
            scores = np.abs(gradient)
            scores[kept] = -1
            at = np.sort(top(scores, min(counts[name], len(kept) - int(kept.sum())), ties(name)))
            found[name] = at + layout.spans[name][0], gradient[at]

        def arrived(name: str, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                reduce(name, gradient.cpu().flatten().numpy())

        hooks = [
            named[name].register_post_accumulate_grad_hook(partial(arrived, name))  # type: ignore[no-untyped-call]
            for name in counts
        ]
        try:
            for name, parameter in named.items():
                parameter.requires_grad_(name in counts)
            with _torch_stream(stream, self.device):
                loss = self.spec.loss(form.module(x), y)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for parameter in named.values():
                parameter.requires_grad_(True)
            for hook in hooks:
                hook.remove()
        for name in counts.keys() - found.keys():  # the loss does not depend on them
            reduce(name, np.zeros(layout.named[name].numel, dtype=np.float32))
        self.flops += len(y) * (2 * self.forward_flops(masks) + sum(self.spec.flops[name] for name in counts))
        order = [slot.name for slot in layout.masked_slots if slot.name in counts]
        if not order:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        positions, values = (np.concatenate([found[name][part] for name in order]) for part in (0, 1))
        return torch.from_numpy(positions), torch.from_numpy(values)

    @torch.no_grad()
    def statistics(self, params: Params, batches: Iterator[tuple[Tensor, Tensor]], masks: Masks | None = None) -> Params:
        """Return `params` with normalisation statistics measured on some batches. See `Client.statistics`."""
        form = self._all
        form.bound.weights.copy_(form.inward((params if masks is None else params.under(masks)).flat))
        _mode(form.module, training=False)
        norms = [layer for layer in form.module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        usual = [layer.momentum for layer in norms]
        for layer in norms:
            layer.reset_running_stats()
            layer.train()
            layer.momentum = None  # the mean over all batches
        try:
            for x, _ in batches:
                form.module(x)
                self.flops += len(x) * self.forward_flops(masks)
        finally:
            for layer, momentum in zip(norms, usual, strict=True):
                layer.momentum = momentum
                layer.eval()
        measured, flat = form.outward(form.bound.weights, params.flat), params.flat.clone()
        flat[self.spec.layout.trainable :] = measured[self.spec.layout.trainable :]
        return Params(self.spec.layout, flat)

    def _form(self, masks: Masks | None, start: Params | None = None) -> Form:
        """Return the form to work on under masks; the last ones are kept, since the clients of a round share them.

        Args:
            masks: the masks, if any.
            start: what training starts from, without a velocity: then dead units may be left out.
        """
        if masks is None:
            return self._all
        flat = start.flat if start is not None and self.local.compact else None
        key = xxh3_128_digest(masks.kept.numpy().data)  # comparing bools takes longer than this
        for kept, known, form in self._forms:
            if kept == key and (flat is None if known is None else flat is not None and torch.equal(known, flat)):
                return form
        form = self._made(self.spec, masks)
        if start is not None and flat is not None:
            small = compact(self.spec, start, masks, training=True)
            if small.spec.layout.size < self.spec.layout.size:
                form = Shrunk(small, masks, self._made(small.spec, small.shrink_masks(masks)))
        self._forms = [(key, None if flat is None else flat.clone(), form), *self._forms[: FORMS - 1]]
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

    @cached_property
    def _recorded(self) -> Form:
        """The form of all weights by PyTorch's own operations, which can be differentiated twice."""
        return Whole(self.spec, replace(self.local, convolution="library"))

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
    def spec(self) -> ModelSpec:
        """The network that the federation trains."""
        return self._executor.spec

    @property
    def layout(self) -> Layout:
        """Layout of the network."""
        return self.spec.layout

    @property
    def lr(self) -> float:
        """Learning rate of the round, as the section `local` says."""
        return self.rate(self.stream.round, self.rounds)

    def rate(self, round: int, rounds: int) -> float:
        """Learning rate that the section `local` gives to a round, 1 to `rounds`, of a run of so many."""
        return rate(self._executor.local, round, rounds)

    def gradient_weight(self, steps: int, *, proximal: float = 0.0) -> float:
        """Total weight of the gradients in so many steps of training from zero velocity: their number, if there is no momentum.

        The difference of the weights over it and over `lr` is a mean of the gradients. See `local.optim.gradient_weight`.
        """
        return gradient_weight(self._executor.local, self.lr, steps, proximal)

    def train(
        self,
        params: Params,
        *,
        masks: Masks | None = None,
        epochs: int | None = None,
        momentum: Tensor | None = None,
        proximal: float = 0.0,
        drift: Tensor | None = None,
        moves: Tensor | None = None,
        reparam: Reparam | None = None,
        lr: float | None = None,
        adam: bool = False,
        spec: ModelSpec | None = None,
        purpose: str = "train",
    ) -> Trained:
        """Train on the client's own examples by SGD as the section `local` says.

        Args:
            params: where training starts.
            masks: weights, gradients and momentum stay on this support after every step.
            epochs: passes over the data; default: the setting.
            momentum: velocity to start from, shape (layout.trainable,); default: zero.
            proximal: weight of (1/2)||w - params||^2 added to the loss.
            drift: vector added to every gradient, shape (layout.trainable,).
            moves: which parameters are trained, the others stay as they are; or factors of their learning rates. Shape
                (layout.trainable,).
            reparam: makes the weights that the network computes with of those that are trained; `params` are the latter.
            lr: learning rate; default: the setting's for this round.
            adam: move by Adam's rule (Kingma and Ba 2015, arXiv 1412.6980), from zero moments, in place of momentum.
            spec: another network, of which `params` are; default: that of the federation.
            purpose: name of the random streams (order of the examples, dropout); another one for a second training in a round.

        Raises:
            Diverged: the loss or a parameter is not finite.
        """
        settings: dict[str, Any] = {
            "masks": masks,
            "epochs": epochs,
            "momentum": momentum,
            "proximal": proximal,
            "drift": drift,
            "moves": moves,
            "reparam": reparam,
            "lr": lr,
            "adam": adam,
            "purpose": purpose,
        }
        where = (params, self._train, self._part, self.stream)
        if spec is not None:
            return self._executor.of(spec).train(*where, **settings)
        return self._train_by(*where, **settings)

    def evaluate(self, params: Params, masks: Masks | None = None, spec: ModelSpec | None = None) -> Metrics:
        """Evaluate on the client's own test examples, `params` being zero where the masks are."""
        return self._executor.of(spec or self.spec).evaluate(params, self._test, self._share, masks)

    def evaluate_training(self, params: Params, masks: Masks | None = None) -> Metrics:
        """Evaluate on the client's own training examples, for choices that must not look at test examples.

        It is work that the method asks of the client, so a forward pass is counted in `flops`; that of `evaluate` is not.
        """
        self._executor.flops += self.examples * self._executor.forward_flops(masks)
        return self._executor.evaluate(params, self._train, self._part, masks)

    def gradients(
        self,
        params: Params,
        masks: Masks | None = None,
        *,
        batches: int | None = 1,
        power: int = 1,
        training: bool = False,
        curvature: bool = False,
        temperature: float = 1.0,
        purpose: str = "gradients",
    ) -> Params:
        """Return the mean gradient of the loss on the client's own examples, with respect to pruned weights too.

        Args:
            params: where the gradient is taken.
            masks: `params` count as zero where these are.
            batches: of `local.batch` examples drawn without replacement; None: all examples.
            power: 2 for the mean over the batches of the squared gradient.
            training: normalise by the batch and drop out, as training does; else as evaluation does.
            curvature: return H g instead, the product of the Hessian with the mean gradient g: the gradient of (1/2)||g||^2.
            temperature: scores are divided by it before the loss.
            purpose: name of the random stream that draws the examples.

        Returns:
            Parameters that hold the gradient, zero for statistics.
        """
        flat = torch.zeros(self.layout.size)
        flat[: self.layout.trainable] = self._executor.gradients(
            params,
            self._batches(batches, purpose),
            masks,
            power=power,
            training=training,
            curvature=curvature,
            temperature=temperature,
            stream=self.stream(f"{purpose}/torch"),
        )
        return Params(self.layout, flat)

    def top_gradients(
        self, params: Params, masks: Masks, counts: Mapping[str, int], *, training: bool = False, purpose: str = "gradients"
    ) -> tuple[Tensor, Tensor]:
        """Return which pruned weights have the steepest gradient on one batch, and that gradient.

        Each tensor's gradient is reduced as soon as the backward pass makes it, so that beside what is returned one tensor's
        is held at a time. The batch is the one that `gradients` takes. Counted are a forward pass and the gradients of
        activations under the masks, and the whole weight gradient of the slots in question.

        Args:
            params: where the gradient is taken.
            masks: `params` count as zero where these are; only weights that these prune are returned.
            counts: how many of each maskable slot; all that are pruned if they are fewer. Other slots need no gradient.
            training: normalise by the batch and drop out, as training does; else as evaluation does.
            purpose: name of the random streams.

        Returns:
            Positions in the maskable part, ascending, int64 (k,), and the gradient there, float32 (k,).
        """
        (batch,) = self._batches(1, purpose)
        ties = {name: self.stream(f"{purpose}/ties/{name}") for name in counts}
        stream = self.stream(f"{purpose}/torch")
        return self._executor.top_gradients(
            params, batch, masks, counts, training=training, stream=stream, ties=ties.__getitem__
        )

    def statistics(
        self, params: Params, masks: Masks | None = None, *, batches: int | None = None, purpose: str = "statistics"
    ) -> Params:
        """Return `params` with BatchNorm's running mean and variance measured on the client's own examples, no gradient taken.

        Each is the mean over the batches (None: of all examples). What is no BatchNorm statistic is returned as it is.
        """
        return self._executor.statistics(params, self._batches(batches, purpose), masks)

    def _batches(self, count: int | None, purpose: str) -> Iterator[tuple[Tensor, Tensor]]:
        batch = self._executor.local.batch
        order = self._part[self.stream(purpose).permutation(len(self._part))]
        return self._train.epoch(order if count is None else order[: count * batch], batch)


def _bringing(form: Form, layout: Layout) -> Callable[[Tensor], Tensor]:
    """Return what puts a vector over the maskable weights into the order of a form, and leaves out what that does not hold."""
    held = form.inward(torch.cat([torch.ones(layout.maskable), torch.zeros(layout.trainable - layout.maskable)]))
    count = int(held.sum())

    def bring(vector: Tensor) -> Tensor:
        return form.inward(torch.cat([vector, torch.zeros(layout.trainable - layout.maskable)]))[:count].contiguous()

    return bring


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
