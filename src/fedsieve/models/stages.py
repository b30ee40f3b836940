"""Networks cut into stages, each a network of its own that is the beginning of the next; the last is the whole network.

Two kinds of modules can be cut:

    nn.Sequential           a stage is its children up to the end of a block, with a local head behind: global average pooling
                            where the last output is a map, then a linear layer to the classes. The head is thrown away later.
    modules with two lists  `down` and `up`, nn.ModuleLists of n and n - 1 blocks, both from the outermost level to the
                            innermost, and a `forward` that takes their lengths from them, so that it runs with the first m and
                            m - 1 too: U-Nets. A stage holds these, so it grows from both ends to the middle; all that is in
                            neither list, such as the output path, is in every stage.

Tensors that a stage has in common with the whole network have the same names there.
"""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import inf

import torch
from torch import Tensor, nn

from fedsieve.errors import UsageError
from fedsieve.init.schemes import glorot_uniform
from fedsieve.models.spec import PRUNABLE, ModelSpec
from fedsieve.params import Kind, Layout, Params, Slot
from fedsieve.streams import Streams

PUBLISHED = {
    "resnet8": ("stage1", "stage2"),
    "resnet20": ("stage1", "stage2"),
    "resnet18": ("stage1", "stage2", "stage3"),
    "vgg11": ("stage2", "stage3", "stage4"),
    "vgg16": ("stage2", "stage3", "stage4"),
}
"""where the blocks of a built-in network end, without the last: the stem of a ResNet is part of its first stage, the
convolutions of a VGG with 64 and 128 channels are one block (Wang et al. 2022, arXiv 2110.05323)"""
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
"""global pooling of one, two and three dimensions"""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage in plain values, which a server's state can hold: its tensors, given the layout of the whole network."""

    names: tuple[str, ...]
    """tensors that it shares with the whole network"""
    head: str = ""
    """name of the local head's linear layer; empty: it has none"""
    inputs: int = 0
    """of the local head"""
    outputs: int = 0

    def layout(self, whole: Layout) -> Layout:
        """Return the layout of the stage."""
        own = [whole.named[name] for name in self.names]
        return Layout.of([*own, *self._head_slots(1 + max((slot.block for slot in own), default=-1))])

    def fresh_head(self, streams: Streams) -> Tensor:
        """Draw the local head's weights, a Glorot start, and zero biases; empty without a head."""
        return glorot_uniform(Layout.of(self._head_slots(0)), streams).flat

    def join(self, whole: Params, head: Tensor) -> Params:
        """Return the stage's parameters: those of the whole network that it shares, and a head."""
        layout = self.layout(whole.layout)
        if layout.fingerprint == whole.layout.fingerprint:
            return whole
        params = Params.zeros(layout)
        for name in self.names:
            params[name].copy_(whole[name])
        for slot, part in zip(self._head_slots(0), self._parts(head), strict=True):
            params[slot.name].copy_(part.view(slot.shape))
        return params

    def split(self, params: Params, whole: Params) -> tuple[Params, Tensor]:
        """Invert `join`: return the whole network with the stage's parameters in place of its own, and the head."""
        changed = Params(whole.layout, whole.flat.clone())
        for name in self.names:
            changed[name].copy_(params[name])
        return changed, torch.cat([torch.empty(0), *(params[slot.name].flatten() for slot in self._head_slots(0))])

    def fresh(self, before: Stage, whole: Layout) -> Tensor:
        """Return which trained parameters the stage before did not have, bool of shape (layout.trainable,)."""
        layout = self.layout(whole)
        found, old = torch.ones(layout.trainable, dtype=torch.bool), {*before.names}
        for name, (begin, end) in layout.spans.items():
            if name in old:
                found[begin:end] = False  # statistics lie beyond the end
        return found

    def _head_slots(self, block: int) -> list[Slot]:
        if not self.head:
            return []
        weight = Slot(f"{self.head}.weight", (self.outputs, self.inputs), Kind.WEIGHT, True, block)
        return [weight, Slot(f"{self.head}.bias", (self.outputs,), Kind.BIAS, False, block)]

    def _parts(self, head: Tensor) -> list[Tensor]:
        return [head[: -self.outputs], head[-self.outputs :]] if self.head else []


def cut(spec: ModelSpec, boundaries: tuple[str, ...] = (), count: int = 0) -> tuple[str, ...]:
    """Return the names of the parts that end all stages but the last.

    Args:
        spec: the whole network.
        boundaries: these names: children of the nn.Sequential, of one within it as `stage1.0`, or `down.0`. Empty: for the
            built-in ResNets and VGGs the blocks as published; else each child with weights begins a block, but the last,
            which is the network's own head; each level of a network with two lists is a block.
        count: number of stages; 0: one a block. Of more blocks than stages the first are one stage.

    Raises:
        UsageError: the module cannot be cut, or not like that.
    """
    module = spec.module
    if not (_has_levels(module) or _is_sequence(module)):
        raise UsageError(
            f"model {spec.name!r} cannot be cut into stages: it is {type(module).__name__}. It takes an nn.Sequential, or a\n"
            "module with nn.ModuleLists `down` and `up`, `up` shorter by one. Set model.name to such a one (mlp, cnn, ...)."
        )
    found = boundaries or _blocks(spec)
    places = [_place(spec, name) for name in found]
    if any(after <= before for before, after in pairwise(places)):
        raise UsageError(
            f"algorithm.boundaries = {', '.join(found)}: they are not in the order of model {spec.name!r}, each once."
            f"\nThere are, in order: {_parts_of(module)}."
        )
    if boundaries and count not in (0, len(boundaries) + 1):
        raise UsageError(
            f"algorithm.stages = {count} does not go with {len(boundaries)} algorithm.boundaries, which make"
            f" {len(boundaries) + 1} stages: leave one of them out."
        )
    if count > len(found) + 1:
        raise UsageError(
            f"algorithm.stages = {count}: model {spec.name!r} has {len(found) + 1} blocks, which end with"
            f" {', '.join([*found, 'the network'])}.\n"
            f"Set it to at most {len(found) + 1}, or name the ends of stages in algorithm.boundaries: {_parts_of(module)}."
        )
    return found[len(found) + 1 - count :] if count else found


@lru_cache(maxsize=16)
def stage_spec(spec: ModelSpec, ends: tuple[str, ...], number: int) -> ModelSpec:
    """Return the network of a stage, 1 to len(ends) + 1; `ends` as from `cut`.

    Raises:
        UsageError: no head fits what the stage ends with.
    """
    if number == len(ends) + 1:
        return spec
    end, name, head = ends[number - 1], f"{spec.name} up to {ends[number - 1]}", None
    module = deepcopy(spec.module)
    if _has_levels(module):
        levels = int(_place(spec, end)[0]) + 1
        module.down, module.up = module.down[:levels], module.up[: levels - 1]  # type: ignore[index]
    else:
        begun = _beginning(module, end.split("."))
        key, head = _head(spec, end, begun, number)
        module = nn.Sequential(OrderedDict([*begun._modules.items(), (key, head)]))
    made = ModelSpec.of(module, spec.example, loss=spec.loss, name=name)
    return replace(made, layout=_described(spec, made).layout(spec.layout))


def described(spec: ModelSpec, ends: tuple[str, ...], number: int) -> Stage:
    """Return a stage in plain values."""
    return _described(spec, stage_spec(spec, ends, number))


def stages(spec: ModelSpec, ends: tuple[str, ...]) -> tuple[Stage, ...]:
    """Return all stages in plain values.

    Raises:
        UsageError: no head fits what a stage ends with, or a stage is larger than the whole network.
    """
    found = []
    for number in range(1, len(ends) + 2):
        made = stage_spec(spec, ends, number)
        if made.layout.size > spec.layout.size:
            raise UsageError(
                f"stage {number}, {made.name}, has {made.layout.size:,} numbers with its head, the whole network"
                f" {spec.layout.size:,}.\nLeave this end out: set algorithm.boundaries, or fewer algorithm.stages."
            )
        found.append(_described(spec, made))
    return tuple(found)


def _described(spec: ModelSpec, made: ModelSpec) -> Stage:
    names = {slot.name for slot in made.layout.slots}
    shared = tuple(slot.name for slot in spec.layout.slots if slot.name in names)
    own = [slot for slot in made.layout.slots if slot.name not in spec.layout.named and slot.kind is Kind.WEIGHT]
    return Stage(shared, own[0].name.removesuffix(".weight"), own[0].shape[1], own[0].shape[0]) if own else Stage(shared)


def _is_sequence(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _has_levels(module: nn.Module) -> bool:
    down, up = (getattr(module, name, None) for name in ("down", "up"))
    return isinstance(down, nn.ModuleList) and isinstance(up, nn.ModuleList) and len(down) == len(up) + 1


def _blocks(spec: ModelSpec) -> tuple[str, ...]:
    """Return where all blocks but the last end."""
    if _has_levels(spec.module):
        return tuple(f"down.{level}" for level in range(len(spec.module.down) - 1))  # type: ignore[arg-type]
    children = spec.module._modules
    published = PUBLISHED.get(spec.name, ())
    if published and all(name in children for name in published):
        return published
    names = list(children)
    weighty = [i for i, child in enumerate(children.values()) if _has_weights(child)]
    found = []
    for before, after in pairwise(weighty[:-1]):
        end = after - 1
        while end > before and isinstance(children[names[end]], (nn.Flatten, *_POOLS)):
            end -= 1
        found.append(names[end])
    return tuple(found)


def _has_weights(module: nn.Module | None) -> bool:
    return module is not None and any(isinstance(layer, PRUNABLE) for layer in module.modules())


def _place(spec: ModelSpec, name: str) -> tuple[float, ...]:
    """Return where a part ends, as a tuple that sorts in the order of the network.

    Raises:
        UsageError: there is no such part, or it is the end of the network.
    """
    module: nn.Module | None = spec.module
    first, *deeper = name.split(".")
    if _has_levels(spec.module):
        known = [str(level) for level in range(len(spec.module.down) - 1)]  # type: ignore[arg-type]
        if first == "down" and len(deeper) == 1 and deeper[0] in known:
            return (float(deeper[0]), inf)
    else:
        place: list[float] = []
        for part in (first, *deeper):
            if not _is_sequence(module) or part not in module._modules:  # type: ignore[union-attr]
                break
            place.append(list(module._modules).index(part))  # type: ignore[union-attr]
            module = module._modules[part]  # type: ignore[union-attr]
        else:
            if place[0] < len(spec.module._modules) - 1:
                return (*place, inf)
            raise UsageError(
                f"algorithm.boundaries: {name!r} is in the last part of model {spec.name!r}. The last stage is the whole\n"
                f"network and needs no end. Leave it out; there are: {_parts_of(spec.module)}."
            )
    raise UsageError(
        f"algorithm.boundaries: model {spec.name!r} has no part {name!r} to end a stage. There are: {_parts_of(spec.module)}."
    )


def _parts_of(module: nn.Module) -> str:
    """Name the parts that can end a stage."""
    if _has_levels(module):
        return ", ".join(f"down.{level}" for level in range(len(module.down) - 1)) or "none"  # type: ignore[arg-type]
    names = []
    for name, child in list(module._modules.items())[:-1]:
        names.append(f"{name} ({name}.{next(iter(child._modules))}, ...)" if _is_sequence(child) and child._modules else name)  # type: ignore[union-attr]
    return ", ".join(names) or "none"


def _beginning(module: nn.Module, path: list[str]) -> nn.Sequential:
    """Return the children up to the one that the path names, itself cut where the path goes on."""
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in module._modules.items():
        kept[name] = _beginning(child, path[1:]) if name == path[0] and path[1:] else child  # type: ignore[arg-type, assignment]
        if name == path[0]:
            break
    return nn.Sequential(kept)


def _head(spec: ModelSpec, end: str, begun: nn.Module, number: int) -> tuple[str, nn.Module]:
    """Make the local head of a stage that ends so, and a name for it."""
    with torch.no_grad():
        features, scores = (module.eval()(spec.example) for module in (begun, deepcopy(spec.module)))
    classes, maps = scores.shape[-1], features.dim() - 2
    name = f"head{number}"
    while name in spec.module._modules:
        name += "_"
    with torch.random.fork_rng(devices=[]):
        if features.dim() == scores.dim():
            return name, nn.Linear(features.shape[-1], classes)
        if scores.dim() == 2 and 1 <= maps <= len(_POOLS):
            pool = _POOLS[maps - 1](1)
            fc = nn.Linear(features.shape[1], classes)
            return name, nn.Sequential(OrderedDict(pool=pool, flatten=nn.Flatten(), fc=fc))
    raise UsageError(
        f"a stage of model {spec.name!r} cannot end at {end!r}: its output of shape {tuple(features.shape)} fits no head for\n"
        f"scores of shape {tuple(scores.shape)}. Set algorithm.boundaries to other parts: {_parts_of(spec.module)}."
    )
