"""Networks of linear layers with ReLUs between them, whose training step is written out.

No graph is recorded, activations and their gradients stay where they are from step to step, and under the plain rule (no
momentum, weight decay or proximal term) the product of the backward pass is added to the weights as it is computed. Each
operation is the one that autograd would choose; only the sum of weights and gradients is rounded once instead of twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsieve.models.spec import Loss, ModelSpec, cross_entropy
from fedsieve.settings import Local

_nll, _nll_backward = torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.grad_input
_NONE, _MEAN, _IGNORED, _ONE = 0, 1, -100, torch.ones(())
"""arguments of the cross-entropy: its reductions, the target that is left out, the gradient of a loss by itself"""
SIZES = 8
"""batches for which the activations are kept, by number of examples"""


class Linear:
    """A linear layer of one client or, with a leading dimension, of several: views of parameters and gradients.

    Args:
        weight: shape (..., out, in).
        bias: shape (..., out), if there is one.
        weight_gradient: like `weight`.
        bias_gradient: like `bias`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, weight_gradient: Tensor, bias_gradient: Tensor | None) -> None:
        self.weight, self._bias, self._weight_gradient, self._bias_gradient = weight, bias, weight_gradient, bias_gradient
        self.outputs, self._across = weight.shape[-2], weight.mT
        self._bias_row = None if bias is None else bias[..., None, :]
        self._bias_gradient_row = None if bias_gradient is None else bias_gradient[..., None, :]
        self.times: Callable[..., Tensor] = torch.mm if weight.dim() == 2 else torch.bmm
        self._plus: Callable[..., Tensor] = torch.addmm if weight.dim() == 2 else torch.baddbmm

    @classmethod
    def named(cls, name: str, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Linear:
        """Take the views of the layer of that name."""
        weight, bias = (f"{name}.{part}".removeprefix(".") for part in ("weight", "bias"))
        return cls(weights[weight], weights.get(bias), gradients[weight], gradients.get(bias))

    def of(self, rows: slice) -> Linear:
        """Return the layer of some of the clients."""
        tensors = (self.weight, self._bias, self._weight_gradient, self._bias_gradient)
        return Linear(*(None if tensor is None else tensor[rows] for tensor in tensors))  # type: ignore[arg-type]

    def forward(self, x: Tensor, out: Tensor) -> None:
        """Write x, shape (..., examples, in), times the weights `out`, shape (..., examples, out)."""
        if self._bias_row is None:
            self.times(x, self._across, out=out)
        else:
            self._plus(self._bias_row, x, self._across, out=out)

    def backward(self, x: Tensor, g: Tensor, ones: Tensor, lr: float) -> None:
        """Take a step of SGD along the gradients or, if `lr` is 0, write them down.

        Args:
            x: inputs of the forward pass.
            g: gradient of its outputs, shape (..., examples, out).
            ones: ones, shape (..., 1, examples).
            lr: learning rate.
        """
        if lr:
            self._plus(self.weight, g.mT, x, alpha=-lr, out=self.weight)
            if self._bias_row is not None:
                self._plus(self._bias_row, ones, g, alpha=-lr, out=self._bias_row)
            return
        self.times(g.mT, x, out=self._weight_gradient)
        if self._bias_gradient_row is not None:
            self.times(ones, g, out=self._bias_gradient_row)


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """What a batch leaves of each layer."""

    outputs: list[Tensor]
    """shape (..., examples, out)"""
    gradients: list[Tensor]
    ones: Tensor
    """shape (..., 1, examples)"""


class Perceptron:
    """A network of linear layers of one client or, with a leading dimension, of several.

    Args:
        layers: from the input on, each with whether a ReLU follows it.
        flat: examples are flattened before the first.
        loss: mean loss of a batch.
    """

    def __init__(self, layers: Sequence[tuple[Linear, bool]], flat: bool, loss: Loss) -> None:
        self._layers, self._flat, self._loss = list(enumerate(layers)), flat, loss
        self._clients = layers[0][0].weight.shape[:-2]
        self._passes: dict[int, _Pass] = {}

    def of(self, rows: slice) -> Perceptron:
        """Return the network of some of the clients."""
        return Perceptron([(layer.of(rows), relu) for _, (layer, relu) in self._layers], self._flat, self._loss)

    def step(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """Take a step of SGD or, if `lr` is 0, write the gradients down; return the loss before it, one a client.

        To be called under `torch.no_grad`.

        Args:
            x: examples, one client after another, as many of each.
            y: their targets.
            lr: learning rate.
        """
        x = x.flatten(1) if self._flat else x.flatten(0, -2)
        below = x.view(*self._clients, -1, x.shape[-1])
        kept = self._pass(below.shape[-2])
        inputs = [below, *kept.outputs]
        for depth, (layer, relu) in self._layers:
            layer.forward(inputs[depth], out=inputs[depth + 1])
            if relu:
                inputs[depth + 1].relu_()
        loss = self._scored(inputs[-1], y, kept.gradients[-1])
        for depth, (layer, relu) in reversed(self._layers):
            g = kept.gradients[depth]
            if relu:
                _threshold_backward(g, inputs[depth + 1], 0, grad_input=g)
            if depth:
                layer.times(g, layer.weight, out=kept.gradients[depth - 1])
            layer.backward(inputs[depth], g, kept.ones, lr)
        return loss

    def _pass(self, examples: int) -> _Pass:
        """Return room for the activations of a batch of so many examples a client."""
        found = self._passes.get(examples)
        if found is None:
            if len(self._passes) == SIZES:
                self._passes.clear()
            outputs, gradients = (
                [torch.empty(*self._clients, examples, layer.outputs) for _, (layer, _) in self._layers] for _ in range(2)
            )
            ones = torch.ones(*self._clients, 1, examples)
            found = self._passes[examples] = _Pass(outputs, gradients, ones)
        return found

    def _scored(self, scores: Tensor, y: Tensor, into: Tensor) -> Tensor:
        """Return the loss of each client, and write the gradient of the scores down."""
        if self._loss is cross_entropy:
            return (_cross_entropies if self._clients else _cross_entropy)(scores, y.flatten(), into)
        if not self._clients:
            return _graded(self._loss, scores, y, into)
        y = y.unflatten(0, (*self._clients, -1))  # type: ignore[no-untyped-call]
        return torch.stack([_graded(self._loss, *each) for each in zip(scores, y, into, strict=True)])


def _cross_entropy(scores: Tensor, labels: Tensor, into: Tensor) -> Tensor:
    """Return the mean loss of scores, shape (examples, out); write their gradient `into`."""
    logs = torch._log_softmax(scores, 1, False)
    value, counted = _nll(logs, labels, None, _MEAN, _IGNORED)
    g = _nll_backward(_ONE, logs, labels, None, _MEAN, _IGNORED, counted)
    torch._log_softmax_backward_data(g, logs, 1, torch.float32, out=into)
    return value  # type: ignore[no-any-return]


def _cross_entropies(scores: Tensor, labels: Tensor, into: Tensor) -> Tensor:
    """Return the mean loss of each client, of scores of shape (clients, examples, out); write their gradient `into`."""
    clients, logs = len(scores), torch._log_softmax(scores.flatten(0, 1), 1, False)
    shares = (labels != _IGNORED).view(clients, -1).float()
    shares /= shares.sum(1, keepdim=True)
    values, counted = _nll(logs, labels, None, _NONE, _IGNORED)
    g = _nll_backward(shares.flatten(), logs, labels, None, _NONE, _IGNORED, counted)
    torch._log_softmax_backward_data(g, logs, 1, torch.float32, out=into.flatten(0, 1))
    return values.view(clients, -1).mul_(shares).sum(1)  # type: ignore[no-any-return]


def _graded(loss: Loss, scores: Tensor, y: Tensor, into: Tensor) -> Tensor:
    """Return a client's loss by any function, of scores of shape (examples, out); write their gradient `into`."""
    with torch.enable_grad():
        leaf = scores.detach().view(*y.shape, -1).requires_grad_()
        value = loss(leaf, y)
        into.copy_(torch.autograd.grad(value, leaf)[0].view_as(into))
    return value.detach()


def perceptron(spec: ModelSpec, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Perceptron:
    """Return a network to which there is no `obstacle`, with its training step written out.

    Args:
        spec: the network.
        weights: views of its parameters by name; with a leading dimension, of several clients.
        gradients: the same of their gradients.
    """
    flat, layers = False, list[tuple[Linear, bool]]()
    for name, layer in _applied(spec.module):
        if type(layer) is nn.Linear:
            layers.append((Linear.named(name, weights, gradients), False))
        elif type(layer) is nn.ReLU:
            layers[-1] = (layers[-1][0], True)
        flat = flat or type(layer) is nn.Flatten
    return Perceptron(layers, flat, spec.loss)


def obstacle(spec: ModelSpec, local: Local) -> str | None:
    """Return why the training step of a network is not written out, in a sentence; None if it is."""
    if (local.device, local.precision, local.linear) != ("cpu", "fp32", "fast"):
        return "Steps are written out with local.device = cpu, local.precision = fp32 and local.linear = fast."
    applied = list(_applied(spec.module))
    linear = [name for name, layer in applied if type(layer) is nn.Linear]
    for place, (name, layer) in enumerate(applied):
        flattens = type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1) and place == 0
        acts = type(layer) is nn.ReLU and place > 0 and linear and applied[place - 1][0] in linear
        if not (flattens or acts or type(layer) is nn.Linear):
            return (
                f"{name or 'It'} is {type(layer).__name__}: steps are written out for linear layers, one after another, with"
                " ReLUs between them and flattening before the first."
            )
    own = {
        f"{name}.{key}".removeprefix(".") for name in linear for key, _ in spec.module.get_submodule(name).named_parameters()
    }
    if odd := sorted(own ^ set(spec.layout.named)):
        return f"{odd[0]} is shared between layers, or not trained."
    if watched := [name for name, layer in spec.module.named_modules() if _overridden(layer)]:
        return f"{watched[0] or 'It'} has hooks, which steps that are written out would not call."
    return None


def _applied(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield what a sequence applies in turn, sequences within it opened, nothing that does nothing."""
    if type(module) is nn.Sequential:
        for child, layer in module._modules.items():
            if layer is not None:
                yield from _applied(layer, f"{name}.{child}".removeprefix("."))
    elif type(module) is not nn.Identity:
        yield name, module


def _overridden(layer: nn.Module) -> bool:
    """Whether a call of the layer is more than its class's `forward`."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)
