"""Exact compaction: the channels and neurons that masks leave without effect are taken out, and the function stays.

A unit (a channel of a convolution, a neuron of a linear layer) is dead where nothing that counts reads it, or where what is
read is constant and can be done without:

    unread      every weight that reads it is pruned, or belongs to a dead unit
    constant    no weight that leads to it is left, so it is its bias, or what normalisation, ReLU and the like make of that;
                a reader can do without it if it is 0, or after training if the reader's bias can take it up exactly: that of a
                linear layer or of a convolution without padding (at the border a padded one reads zeros)

Death spreads both ways. In training a constant counts only if no step can change it and nothing behind it gets a gradient: 0
for want of a bias, or not above 0 in front of a ReLU and read there alone. Units that are added to one another share their
fate; channels that GroupNorm puts in one group do; see `fedsieve.models.channels` for what protects units.

BatchNorm of a constant c is (c - mean) * scale / sqrt(var + eps) + shift by the running statistics in evaluation, and the shift
in training. A c other than 0 leaves rounding there, which sqrt(eps) enlarges, so the shift must be below 0 by more than that;
and both values must be <= 0 in front of a ReLU, for then the value in evaluation stays so while the statistics move to c and 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from math import nan

import torch
from torch import Tensor, nn

from fedsieve.models.channels import Network, Op, Step, channels
from fedsieve.models.spec import CONVOLUTIONS, ModelSpec
from fedsieve.params import Layout, Masks, Params

ROUNDING = 1e-5
"""relative error allowed for a mean of equal float32 numbers"""


@dataclass(frozen=True, slots=True, eq=False)
class Compact:
    """A smaller network, and where each of its numbers stands in the large one."""

    spec: ModelSpec
    """of the small network: the same names, losses and blocks, smaller tensors; its module is an ordinary one"""
    origin: Tensor
    """int64 (spec.layout.size,): position of each element in the flat vector of the large layout, ascending within a slot"""
    params: Params
    """of the small network, zero where the masks are; after training with the constants taken up in the biases"""
    filling: Tensor
    """bool (spec.layout.size,): numbers of dead units that stay to fill up a width"""

    def shrink(self, params: Params) -> Params:
        """Take the elements that are left from parameters (..., size) of the large network, as they are."""
        return Params(self.spec.layout, params.flat[..., self.origin])

    def shrink_masks(self, masks: Masks) -> Masks:
        """Take the elements that are left from masks of the large network."""
        return Masks(self.spec.layout, masks.kept[self.origin[: self.spec.layout.maskable]])

    def expand(self, params: Params, into: Params) -> Params:
        """Return a copy of `into`, of the large layout, with the small network's parameters in their places.

        Deviates: dead units, removed or filling up, stay as they are in `into`. In the large network plain SGD leaves them so
        too, but for what does not touch the function: weight decay and a velocity from before would move such of their weights
        as the masks keep, and their running statistics would go on moving.
        """
        flat = into.flat.clone()
        flat[..., self.origin[~self.filling]] = params.flat[..., ~self.filling]
        return Params(into.layout, flat)


def compact(
    spec: ModelSpec,
    params: Params,
    masks: Masks,
    *,
    training: bool,
    multiple: int = 1,
    momentum: Tensor | None = None,
) -> Compact:
    """Remove the dead channels and neurons of a masked network.

    The function is the same in evaluation, up to rounding. With `training` it is in training mode too, gradients included, so
    that training goes on as the large network's would under the same masks: units that could come to life stay. A dropout of
    neurons becomes one that draws for the whole width still, so that those left get the same numbers; one of channels protects
    what it reads. Without `training` constants are also taken up in biases, and all modules are PyTorch's own. Inputs and
    outputs of the network are never removed; if nothing is, `origin` counts from 0 on.

    Args:
        spec: the large network.
        params: its parameters, shape (size,).
        masks: which maskable weights are kept.
        training: the small network is to be trained further.
        multiple: widths are multiples of it, >= 1, or the whole width: dead units of lowest index are kept. Every layer keeps
            at least one.
        momentum: velocity that training starts from, shape (layout.trainable,): a bias that moves is no constant.
    """
    job = _Job(spec, channels(spec, training=training), params.under(masks), masks, training, momentum)
    states = _constants(job)
    live = _live(job, states)
    kept = _kept(job.network, live, multiple)
    final = job.params if training else _folded(job, states, live)
    positions = Params(spec.layout, torch.arange(spec.layout.size))
    left = _narrowed(job, kept, positions)
    layout = Layout(tuple(replace(slot, shape=tuple(left[slot.name].shape)) for slot in spec.layout.slots))
    origin = torch.cat([left[slot.name].flatten() for slot in layout.slots])
    filling = torch.zeros(spec.layout.size, dtype=torch.bool)
    if not torch.equal(kept, live):
        filling[origin] = True
        for tensor in _narrowed(job, live, positions).values():
            filling[tensor.flatten()] = False
    small = Params(layout, final.flat[origin])
    flops = {slot.name: spec.flops[slot.name] * slot.numel // spec.layout.named[slot.name].numel for slot in layout.slots}
    module = narrow(spec.module, small)
    for step in job.network.steps:
        if step.op is Op.DROPOUT and step.layer and not kept[step.units].all():
            dropout = module.get_submodule(step.layer)
            module.set_submodule(step.layer, Dropout(float(dropout.p), kept[step.units]))  # type: ignore[arg-type]
    return Compact(replace(spec, module=module, layout=layout, flops=flops), origin, small, filling[origin])


def narrow(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module that holds these tensors, by name, in place of its own, and has the widths that follow."""
    memo: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        old = getattr(module.get_submodule(path), leaf)
        memo[id(old)] = nn.Parameter(tensor.clone()) if isinstance(old, nn.Parameter) else tensor.clone()
    small = deepcopy(module, memo)
    for layer in small.modules():
        if isinstance(layer, CONVOLUTIONS) and type(layer) in CONVOLUTIONS and layer.groups == 1:
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
        elif type(layer) is nn.Linear:
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            given = layer.weight if layer.weight is not None else layer.running_mean
            layer.num_features = layer.num_features if given is None else len(given)
        elif type(layer) is nn.GroupNorm and layer.affine:
            size = layer.num_channels // layer.num_groups
            layer.num_channels, layer.num_groups = len(layer.weight), len(layer.weight) // size
    return small


class Dropout(nn.Module):
    """Dropout of the neurons that are left, by the numbers that one of all neurons draws.

    Args:
        p: chance that a neuron is set to 0.
        kept: bool (neurons,): those that are left.
    """

    def __init__(self, p: float, kept: Tensor) -> None:
        super().__init__()
        self.p, self.width = p, len(kept)
        self.register_buffer("kept", kept.nonzero().flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., neurons left) to the same shape."""
        if not self.training:
            return x
        factors = nn.functional.dropout(x.new_ones(*x.shape[:-1], self.width), self.p)
        return x * factors[..., self.get_buffer("kept")]


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """What is known of the channels of a result."""

    value: Tensor
    """float64 (channels,): the constant that a channel is; NaN: it varies. Of one that is not firm: the larger of its values
    in training and evaluation"""
    firm: Tensor
    """bool (channels,): a constant that no step of training changes, and behind which nothing gets a gradient"""

    @property
    def gone(self) -> Tensor:
        """Channels that are 0 for good."""
        return self.firm & (self.value == 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    spec: ModelSpec
    network: Network
    params: Params
    """zero where the masks are"""
    masks: Masks
    training: bool
    momentum: Tensor | None

    def tensor(self, step: Step, leaf: str, default: float) -> Tensor:
        """A vector of a layer, float64 (channels,)."""
        name = f"{step.layer}.{leaf}"
        if name in self.spec.layout.named:
            return self.params[name].double()
        return torch.full((len(step.units),), default, dtype=torch.float64)

    def still(self, step: Step, leaf: str) -> Tensor:
        """Which elements of a layer's vector do not move without a gradient, bool (channels,)."""
        name = f"{step.layer}.{leaf}"
        if self.momentum is None or name not in self.spec.layout.named:
            return torch.ones(len(step.units), dtype=torch.bool)
        return self.momentum[slice(*self.spec.layout.spans[name])] == 0

    def fixed(self, step: Step, leaf: str) -> Tensor:
        """Which elements of a layer's vector are not trained: there is none, or they are pruned."""
        slot = self.spec.layout.named.get(f"{step.layer}.{leaf}")
        if slot is None:
            return torch.ones(len(step.units), dtype=torch.bool)
        return ~self.masks[slot.name] if slot.maskable else torch.zeros(slot.shape, dtype=torch.bool)

    def links(self, step: Step) -> Tensor:
        """Which inputs of a layer each of its units reads, bool (out, in): in training by the masks, else by the weights."""
        slot = self.spec.layout.named[f"{step.layer}.weight"]
        if not self.training:
            present = self.params[slot.name] != 0
        elif slot.maskable:
            present = self.masks[slot.name]
        else:
            return torch.ones(slot.shape[:2], dtype=torch.bool)
        return present.view(*slot.shape[:2], -1).any(2)

    def folds(self, step: Step) -> bool:
        """Whether the bias of a layer can take up a constant that the layer reads."""
        return not self.training and f"{step.layer}.bias" in self.spec.layout.named and not self.padded(step)

    def padded(self, step: Step) -> bool:
        """Whether a layer reads zeros beside its input."""
        padding = getattr(self.spec.module.get_submodule(step.layer), "padding", 0)
        return padding != "valid" and (padding == "same" or any(torch.tensor(padding).view(-1).tolist()))


def _constants(job: _Job) -> list[_State]:
    """Find what is constant, step after step from the input on."""
    states: list[_State] = []
    for step in job.network.steps:
        inputs = [states[number] for number in step.inputs]
        value, firm = _RULES[step.op](job, step, inputs)
        if job.training and not step.alone:  # another reader may hand on a gradient
            value = torch.where(firm, value, nan)
        states.append(_State(value, firm & ~value.isnan()))
    return states


Found = tuple[Tensor, Tensor]


def _layer(job: _Job, step: Step, inputs: list[_State]) -> Found:
    value, links = job.tensor(step, "bias", 0), job.links(step)
    if not inputs:
        varies = torch.ones(links.shape[1], dtype=torch.bool)
    elif job.training:
        varies = ~inputs[0].gone
    else:
        constant = inputs[0].value
        varies = constant.isnan() | ((constant != 0) & job.padded(step))
        value = value + _sums(job, step, ~varies & (constant != 0), constant)
    value[(links & varies).any(1) | ~job.still(step, "bias")] = nan
    return value, job.fixed(step, "bias") | (not job.training)


def _sums(job: _Job, step: Step, chosen: Tensor, constant: Tensor) -> Tensor:
    """What some constant inputs of a layer add to its outputs where no padding is read, float64 (out,)."""
    weight = job.params[f"{step.layer}.weight"]
    return weight.view(*weight.shape[:2], -1)[:, chosen].double().sum(2) @ constant[chosen]


def _batch(job: _Job, step: Step, inputs: list[_State]) -> Found:
    layer, value = job.spec.module.get_submodule(step.layer), inputs[0].value
    scale, shift = job.tensor(step, "weight", 1), job.tensor(step, "bias", 0)
    eps = float(layer.eps)  # type: ignore[arg-type]
    rounding = ROUNDING * (value * scale).abs() / eps**0.5
    trained = shift + rounding
    evaluated = trained if job.training else torch.where(rounding == 0, shift, nan)
    if layer.running_mean is not None:
        mean, var = job.tensor(step, "running_mean", 0), job.tensor(step, "running_var", 1)
        evaluated = (value - mean) * scale / (var + eps).sqrt() + shift
    if not job.training:
        return torch.where(scale == 0, shift, evaluated), torch.ones_like(inputs[0].firm)
    larger = torch.maximum(trained, evaluated)
    still = job.still(step, "weight") & job.still(step, "bias")
    return torch.where(still & (larger <= 0), larger, nan), torch.zeros_like(inputs[0].firm)


def _group(job: _Job, step: Step, inputs: list[_State]) -> Found:
    layer = job.spec.module.get_submodule(step.layer)
    zero = inputs[0].gone.view(int(layer.num_groups), -1)  # type: ignore[arg-type]
    still = zero.all(1, keepdim=True).expand_as(zero).flatten() & job.still(step, "bias")
    return torch.where(still, job.tensor(step, "bias", 0), nan), job.fixed(step, "bias") | (not job.training)


def _map(job: _Job, step: Step, inputs: list[_State]) -> Found:
    value, firm = inputs[0].value, inputs[0].firm
    function = step.function or Tensor.clone
    mapped = torch.where(value.isnan(), nan, function(value.nan_to_num()))
    return torch.where(firm, mapped, nan), firm


def _gate(job: _Job, step: Step, inputs: list[_State]) -> Found:
    shut = inputs[0].value <= 0
    value, firm = _map(job, step, inputs)
    return torch.where(shut, 0.0, value), firm | shut


def _same(job: _Job, step: Step, inputs: list[_State]) -> Found:
    return inputs[0].value, inputs[0].firm


def _average(job: _Job, step: Step, inputs: list[_State]) -> Found:
    return torch.where(inputs[0].gone, inputs[0].value, nan), inputs[0].gone


def _add(job: _Job, step: Step, inputs: list[_State]) -> Found:
    return inputs[0].value + inputs[1].value, inputs[0].firm & inputs[1].firm


def _take(job: _Job, step: Step, inputs: list[_State]) -> Found:
    value, firm = (torch.cat([getattr(each, part) for each in inputs])[step.take] for part in ("value", "firm"))
    return value, firm


_RULES = {
    Op.LAYER: _layer,
    Op.BATCH: _batch,
    Op.GROUP: _group,
    Op.MAP: _map,
    Op.GATE: _gate,
    Op.SAME: _same,
    Op.AVERAGE: _average,
    Op.DROPOUT: _average,
    Op.ADD: _add,
    Op.TAKE: _take,
}


def _live(job: _Job, states: list[_State]) -> Tensor:
    """Find the units that cannot go, bool (units,): those protected, and from them back to what they read."""
    steps = job.network.steps
    live = job.network.protected.clone()
    reads = []
    for step in reversed(steps):
        if step.op is Op.LAYER and step.inputs:
            state, units = states[step.inputs[0]], steps[step.inputs[0]].units
            spared = state.gone if not job.folds(step) else ~state.value.isnan()
            reads.append((step.units, job.links(step) & ~spared, units))
    while True:
        before = int(live.sum())
        for outputs, links, units in reads:
            live[units[links[live[outputs]].any(0)]] = True
        if int(live.sum()) == before:
            return live


def _kept(network: Network, live: Tensor, multiple: int) -> Tensor:
    """Add dead units until each layer has a width that is allowed; the first ones come first."""
    kept = live.clone()
    while True:
        before = int(kept.sum())
        for step in network.steps:
            if step.op is Op.LAYER:
                while not (there := kept[step.units]).all() and (not there.any() or int(there.sum()) % multiple):
                    kept[step.units[~there][0]] = True
        if int(kept.sum()) == before:
            return kept


def _folded(job: _Job, states: list[_State], live: Tensor) -> Params:
    """Let biases take up what dead units add to them, and cut these off, also where they stay to fill up a width."""
    params = Params(job.spec.layout, job.params.flat.clone())
    for step in job.network.steps:
        if step.op is Op.LAYER and step.inputs:
            value = states[step.inputs[0]].value
            dead = ~live[job.network.steps[step.inputs[0]].units]
            if job.folds(step):
                params[f"{step.layer}.bias"].add_(_sums(job, step, dead & (value != 0) & ~value.isnan(), value))
            params[f"{step.layer}.weight"][:, dead] = 0
    return params


def _narrowed(job: _Job, kept: Tensor, tensors: Params) -> dict[str, Tensor]:
    """Leave out the rows and columns of the units that go."""
    found = dict(tensors)
    steps = job.network.steps
    for step in steps:
        for name in (f"{step.layer}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")):
            if step.layer and name in found:
                found[name] = found[name][kept[step.units]]
        if step.op is Op.LAYER and step.inputs:
            name = f"{step.layer}.weight"
            found[name] = found[name][:, kept[steps[step.inputs[0]].units]]
    return found
