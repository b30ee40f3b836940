"""A network whose sparse layers are computed over their kept weights only; see `fedsieve.local.sparse_kernels`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from fedsieve.local.examples_last import keep_last, window_of
from fedsieve.local.patterns import Pattern
from fedsieve.local.sparse_kernels import Chain, Stage
from fedsieve.params import Masks


class _Link(NamedTuple):
    """A layer in a chain, with the layers behind it whose work it does."""

    layer: nn.Module
    stage: Stage
    done: list[nn.Module]


def sparsify(module: nn.Module, masks: Masks, names: Sequence[str]) -> None:
    """Have the named layers of a module computed over their kept weights, which their `weight` then holds, shape (kept,)."""
    patterns = {}
    for name in names:
        layer = module.get_submodule(name)
        kept = masks[f"{name}.weight"]
        patterns[layer] = _pattern(layer, kept)
        layer.weight = nn.Parameter(layer.get_parameter("weight").detach()[kept])
    keep_last(module)
    lone = dict(patterns)
    shared = Counter(id(child) for parent in module.modules() for child in parent._modules.values())
    for parent in module.modules():
        if type(parent) is nn.Sequential:
            for chain in _chains(parent, patterns, shared):
                for link in chain:
                    lone.pop(link.layer, None)
                _join(chain)
    for layer, pattern in lone.items():
        _join([_Link(layer, Stage(pattern), [])])


def _pattern(layer: nn.Module, kept: Tensor) -> Pattern:
    if isinstance(layer, nn.Conv2d):
        padding = (int(layer.padding[0]), int(layer.padding[1]))
        stride, dilation = (layer.stride[0], layer.stride[1]), (layer.dilation[0], layer.dilation[1])
        return Pattern(kept.numpy(), stride, padding, dilation, layer.groups)
    return Pattern(kept.numpy())


def _chains(parent: nn.Sequential, patterns: Mapping[nn.Module, Pattern], shared: Counter[int]) -> Iterator[list[_Link]]:
    """Yield the runs of layers that follow one another and can be one chain."""
    chain: list[_Link] = []
    children = [child for child in parent if type(child) is not nn.Identity]
    place = 0
    while place < len(children):
        layer = children[place]
        place += 1
        if layer not in patterns or shared[id(layer)] > 1:
            yield from [chain] if chain else []
            chain = []
            continue
        window, relu, done = (1, 1), False, []
        linear = isinstance(layer, nn.Linear)
        for follower in children[place:]:
            pooled = window_of(follower) if type(follower) is nn.MaxPool2d and window == (1, 1) and not linear else None
            if shared[id(follower)] > 1 or not (pooled or type(follower) is nn.ReLU):
                break
            window, relu = pooled or window, relu or not pooled
            done.append(follower)
        place += len(done)
        following = children[place] if place < len(children) else None
        flat = type(following) is nn.Flatten and (following.start_dim, following.end_dim) == (1, -1) and not linear
        if following is not None and flat and place + 1 < len(children) and children[place + 1] in patterns:
            done.append(following)
            place += 1
        chain.append(_Link(layer, Stage(patterns[layer], window, relu), done))
        follows = children[place] if place < len(children) else None
        goes_on = isinstance(follows, nn.Linear if linear or following in done else nn.Conv2d)
        if not goes_on:
            yield chain
            chain = []
    if chain:
        yield chain


def _join(chain: list[_Link]) -> None:
    """Have the first layer of a chain compute all of it."""
    layers = [link.layer for link in chain]
    run = partial(_run, Chain([link.stage for link in chain]), layers)
    for layer in layers:
        layer.forward = _same
    for link in chain:
        for layer in link.done:
            layer.forward = _same
    layers[0].forward = run


def _same(x: Tensor) -> Tensor:
    return x


def _run(chain: Chain, layers: list[nn.Module], x: Tensor) -> Tensor:
    values, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not isinstance(layers[0], nn.Linear):
        y = chain(x, values, biases)  # type: ignore[arg-type]
        return y.flatten(1) if isinstance(layers[-1], nn.Linear) else y
    rows = x.reshape(-1, x.shape[-1])
    y = chain(rows[:, :, None, None], values, biases)  # type: ignore[arg-type]
    return y.view(len(rows), -1).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return, no-untyped-call]
