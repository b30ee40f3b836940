"""A network whose sparse layers are computed over their kept weights only; see `fedsieve.local.sparse_kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from fedsieve.local.examples_last import keep_last, window_of
from fedsieve.local.patterns import Pattern
from fedsieve.local.sparse_kernels import Chain, Stage
from fedsieve.params import Masks

Apply = Callable[[Tensor], Tensor]


class _Link(NamedTuple):
    """A sparse layer among the children of a sequence, and the stage that does its work and that of those behind it."""

    layer: nn.Module
    stage: Stage
    flat: bool
    """its outputs are flattened for a linear layer"""
    end: int
    """place of the first child whose work it does not do"""


def sparsify(module: nn.Module, masks: Masks, names: Sequence[str]) -> None:
    """Have the named layers of a module computed over their kept weights, which their `weight` then holds, shape (kept,).

    A layer computes itself, however it is called. An `nn.Sequential`, called as a whole, computes its layers as chains.
    """
    patterns = {}
    for name in names:
        layer = module.get_submodule(name)
        kept = masks[f"{name}.weight"]
        patterns[layer] = _pattern(layer, kept)
        layer.weight = nn.Parameter(layer.get_parameter("weight").detach()[kept])
        layer.forward = _joined([_Link(layer, Stage(patterns[layer]), False, 0)])
    keep_last(module)
    for parent in module.modules():
        if type(parent) is nn.Sequential and any(child in patterns for child in parent):
            parent.forward = partial(_in_turn, list(_applied(list(parent), patterns)))  # type: ignore[method-assign]


def _pattern(layer: nn.Module, kept: Tensor) -> Pattern:
    if isinstance(layer, nn.Conv2d):
        padding = (int(layer.padding[0]), int(layer.padding[1]))
        stride, dilation = (layer.stride[0], layer.stride[1]), (layer.dilation[0], layer.dilation[1])
        return Pattern(kept.numpy(), stride, padding, dilation, layer.groups)
    return Pattern(kept.numpy())


def _applied(children: Sequence[nn.Module], patterns: Mapping[nn.Module, Pattern]) -> Iterator[Apply]:
    """Yield what computes the children of a sequence: chains, and children as they are."""
    place = 0
    while place < len(children):
        links = list(_links(children, place, patterns))
        yield _joined(links) if links else children[place]
        place = links[-1].end if links else place + 1


def _links(children: Sequence[nn.Module], place: int, patterns: Mapping[nn.Module, Pattern]) -> Iterator[_Link]:
    """Yield the layers from a place on that can be one chain."""
    link = None
    while place < len(children) and children[place] in patterns and not _hooked(children[place]):
        linear = isinstance(children[place], nn.Linear)
        if link is not None and linear is not (link.flat or isinstance(link.layer, nn.Linear)):
            return
        link = _link(children, place, patterns)
        yield link
        place = link.end


def _link(children: Sequence[nn.Module], place: int, patterns: Mapping[nn.Module, Pattern]) -> _Link:
    """Take a sparse layer with the pooling, ReLU and flattening behind it."""
    layer = children[place]
    linear, window, relu, end = isinstance(layer, nn.Linear), (1, 1), False, place + 1
    for follower in children[end:]:
        pooled = window_of(follower) if type(follower) is nn.MaxPool2d and window == (1, 1) and not linear else None
        if _hooked(follower) or not (pooled or type(follower) in (nn.ReLU, nn.Identity)):
            break
        window, relu, end = pooled or window, relu or type(follower) is nn.ReLU, end + 1
    flat = False
    for follower, next_ in pairwise(children[end : end + 2]):
        flattens = type(follower) is nn.Flatten and (follower.start_dim, follower.end_dim) == (1, -1)
        flat = flattens and not linear and not _hooked(follower) and next_ in patterns and isinstance(next_, nn.Linear)
    return _Link(layer, Stage(patterns[layer], window, relu), flat, end + flat)


def _hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to be told when the layer is called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _joined(links: Sequence[_Link]) -> Apply:
    """Return what computes some layers as a chain."""
    return partial(_run, Chain([link.stage for link in links]), [link.layer for link in links])


def _in_turn(applied: Sequence[Apply], x: Tensor) -> Tensor:
    for apply in applied:
        x = apply(x)
    return x


def _run(chain: Chain, layers: list[nn.Module], x: Tensor) -> Tensor:
    values, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not isinstance(layers[0], nn.Linear):
        y = chain(x, values, biases)  # type: ignore[arg-type]
        return y.flatten(1) if isinstance(layers[-1], nn.Linear) else y
    rows = x.reshape(-1, x.shape[-1])
    y = chain(rows[:, :, None, None], values, biases)  # type: ignore[arg-type]
    return y.view(len(rows), -1).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return, no-untyped-call]
