"""The channels of a network: which operations make, carry and read them, found by symbolic tracing.

A unit is a channel of a convolution or a neuron of a linear layer. Normalisation, activations and pooling carry units on,
flattening repeats each over its positions, and addition ties units together: one can only go if the other goes. What is not
understood (recurrent layers, attention, grouped convolutions, reshapes to fixed sizes, products ...) protects the units that
it touches.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedsieve.models.spec import CONVOLUTIONS, NORMS, TRANSPOSED, ModelSpec

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
POOL_FUNCTIONS = (
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
)  # fmt: skip
AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
GATES = (nn.ReLU, nn.ReLU6, F.relu, F.relu6, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
"""0 with gradient 0 wherever the input is <= 0"""
MAPS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid,
    nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip
"""modules that map each element by itself"""
FUNCTIONS = (
    F.relu, F.relu6, F.relu_, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.sigmoid,
    F.logsigmoid, F.tanh, F.tanhshrink, F.hardtanh, F.hardswish, F.hardsigmoid, torch.relu, torch.relu_, torch.tanh,
    torch.sigmoid, "relu", "relu_", "tanh", "sigmoid",
)  # fmt: skip
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
FRESH = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *NORMS)
"""layers whose result shares no memory with another tensor"""


_IN_PLACE_OPERATORS = tuple(name for name in vars(operator) if name.startswith("i") and name[1:] in vars(operator))
Function = Callable[..., Tensor]


class Op(Enum):
    """What a step does with channels."""

    LAYER = auto()
    """convolution or linear: reads channels and makes others"""
    BATCH = auto()
    GROUP = auto()
    MAP = auto()
    """an elementwise function"""
    GATE = auto()
    """a ReLU"""
    SAME = auto()
    """pooling and the like, which keep a constant"""
    AVERAGE = auto()
    """pooling that averages zeros of its padding in, or divides by a number of its own"""
    DROPOUT = auto()
    """dropout in training; one with a name of its own acts on the last dimension"""
    ADD = auto()
    TAKE = auto()
    """flattening and concatenation: channels are repeated and put in another order"""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation and the channels of its result."""

    op: Op
    inputs: tuple[int, ...]
    """numbers of the steps that it reads; empty: what a layer reads has no channels that could go"""
    units: Tensor
    """the unit of each channel, int64 (channels,); units that go together have one number"""
    axis: int
    """dimension of the channels"""
    alone: bool
    """exactly one operation reads the result"""
    layer: str = ""
    """name of a layer, normalisation or dropout"""
    function: Function | None = None
    """of MAP and GATE"""
    take: Tensor | None = None
    """of TAKE: which of the inputs' channels, put one after another, each channel is"""


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """The steps of a network in order, and the units that something unknown, or the output, reads."""

    steps: tuple[Step, ...]
    protected: Tensor
    """bool (units,)"""


class _Unclear(Exception):
    """Something may change a tensor in place that is read elsewhere."""


@lru_cache(maxsize=8)
def channels(spec: ModelSpec, *, training: bool) -> Network:
    """Find the channels of a network, in training or evaluation mode; one that cannot be traced has none.

    Exact for what the traced code says: a module whose Python code takes another path for another input cannot be traced, and
    what a forward hook does is not seen, so a layer with hooks is unknown.
    """
    try:
        return _Reading(spec, training).network()
    except Exception:  # own modules may raise anything when they are given a symbol for a tensor
        return Network((), torch.zeros(0, dtype=torch.bool))


class _Reading:
    """Reads a traced graph node by node."""

    def __init__(self, spec: ModelSpec, training: bool) -> None:
        self._training = training
        self._module = deepcopy(spec.module).train(training)
        self._graph = fx.Tracer().trace(self._module)
        shapes = _Shapes(self._module.eval(), graph=self._graph)
        with torch.no_grad():
            shapes.run(spec.example.clone())
        self._shapes = shapes.found
        called = (str(node.target) for node in self._graph.nodes if node.op == "call_module")
        self._calls = Counter(id(self._module.get_submodule(name)) for name in called)
        self._plain = self._plain_layers(spec)
        self._steps: list[Step] = []
        self._known: dict[Any, int] = {}
        self._batch_sizes: set[fx.Node] = set()
        self._exclusive: set[fx.Node] = set()
        self._units = 0
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._protected: list[Tensor] = []

    def network(self) -> Network:
        for node in self._graph.nodes:
            step = self._step(node)
            if step is not None:
                self._known[node] = len(self._steps)
                self._steps.append(step)
            elif node not in self._batch_sizes:
                if _mutates(node) and node not in self._exclusive:
                    raise _Unclear
                self._protected += [
                    self._steps[self._known[each]].units for each in node.all_input_nodes if each in self._known
                ]
        labels = _labels(self._units, self._ties)
        protected = torch.zeros(self._units, dtype=torch.bool)
        for units in self._protected:
            protected[labels[units]] = True
        return Network(tuple(replace(step, units=labels[step.units]) for step in self._steps), protected)

    def _plain_layers(self, spec: ModelSpec) -> dict[str, nn.Module]:
        """Return the layers that are called once, without hooks, all of whose tensors are slots that no other layer holds."""
        taken = {str(node.target).rpartition(".")[0] for node in self._graph.nodes if node.op == "get_attr"}
        holders = Counter(id(tensor) for _, tensor in self._module.named_parameters(remove_duplicate=False))
        plain = {}
        for name, layer in self._module.named_modules():
            tensors = {
                key: tensor for key, tensor in [*layer._parameters.items(), *layer._buffers.items()] if tensor is not None
            }
            tensors.pop("num_batches_tracked", None)
            slots = all(f"{name}.{key}" in spec.layout.named and holders[id(each)] <= 1 for key, each in tensors.items())
            if self._calls[id(layer)] == 1 and name not in taken and tensors and slots and not _changed(layer):
                plain[name] = layer
        return plain

    def _step(self, node: fx.Node) -> Step | None:
        """Return what a node does with channels; None where that is unknown, or nothing."""
        if node.op == "call_module":
            return self._module_step(node)
        if node.op in ("call_function", "call_method"):
            return self._function_step(node)
        return None

    def _module_step(self, node: fx.Node) -> Step | None:
        name = str(node.target)
        layer = self._module.get_submodule(name)
        kind: type[nn.Module] = type(layer)
        if getattr(layer, "inplace", False):
            self._check_in_place(node)
        if len(node.args) != 1 or node.kwargs or _changed(layer):
            return None
        if name in self._plain and kind in (*CONVOLUTIONS, nn.Linear):
            return self._layer(node, name, layer)
        source = self._source(node)
        if source is None:
            return None
        if kind is nn.Identity:
            return self._carried(node, Op.SAME)
        if kind in MAPS:
            return self._carried(node, Op.GATE if kind in GATES else Op.MAP, function=layer)
        if kind in DROPOUTS:
            if not self._training or not getattr(layer, "p", 0):
                return self._carried(node, Op.SAME)
            last = source.axis == len(self._shapes[node]) - 1
            if kind is nn.Dropout and last and self._calls[id(layer)] == 1:
                return self._carried(node, Op.DROPOUT, layer=name)
            self._protected.append(source.units)  # with another width it would draw other numbers
            return self._carried(node, Op.DROPOUT)
        if kind is nn.Flatten:
            return self._flatten(node, source, layer.start_dim, layer.end_dim)  # type: ignore[arg-type]
        if source.axis != 1:
            return None
        if kind in POOLS and not getattr(layer, "return_indices", False):
            own = getattr(layer, "divisor_override", None) or ("Avg" in kind.__name__ and _padded(layer))
            return self._carried(node, Op.AVERAGE if own else Op.SAME)
        if kind in BATCH_NORMS and name in self._plain:
            return self._carried(node, Op.BATCH, layer=name)
        if type(layer) is nn.GroupNorm and name in self._plain:
            groups = source.units.view(layer.num_groups, -1)
            self._ties.append((groups.flatten(), groups[:, :1].expand_as(groups).flatten()))
            return self._carried(node, Op.GROUP, layer=name)
        return None

    def _layer(self, node: fx.Node, name: str, layer: nn.Module) -> Step | None:
        source, shape = self._source(node), self._shapes[node]
        weight = layer.get_parameter("weight")
        axis = len(shape) - 1 if isinstance(layer, nn.Linear) else 1
        whole = isinstance(layer, nn.Linear) or (layer.groups == 1 and len(shape) == weight.dim())
        if not whole or axis == 0 or (source is not None and source.axis != axis):
            return None
        units = torch.arange(self._units, self._units + len(weight))
        self._units += len(weight)
        inputs = () if source is None else (self._known[node.args[0]],)
        return Step(Op.LAYER, inputs, units, axis, len(node.users) == 1, layer=name)

    def _function_step(self, node: fx.Node) -> Step | None:
        target, args = node.target, node.args
        self._find_batch_sizes(node)
        if target in ADDITIONS:
            return self._addition(node)
        if target is torch.cat:
            return self._concatenation(node)
        if target in FUNCTIONS and _mutates(node):
            self._check_in_place(node)
        source = self._source(node)
        if source is None:
            return None
        if target in FUNCTIONS and len(node.all_input_nodes) == 1:
            function = getattr(Tensor, target) if isinstance(target, str) else target
            call = partial(_call, function, args[1:], node.kwargs)
            return self._carried(node, Op.GATE if target in GATES else Op.MAP, function=call)
        if target in POOL_FUNCTIONS and source.axis == 1 and not (node.kwargs.get("return_indices") or True in args):
            return self._carried(node, Op.SAME)
        if target in AVERAGES and source.axis == 1:
            plain = len(args) <= 3 and node.kwargs.keys() <= {"kernel_size", "stride", "ceil_mode"}
            return self._carried(node, Op.SAME if plain else Op.AVERAGE)
        if target in (torch.flatten, "flatten"):
            given = _given(node, "start_dim", "end_dim")
            return self._flatten(node, source, given.get("start_dim", 0), given.get("end_dim", -1))
        if target in ("view", "reshape") and len(args) == 3 and args[1] in self._batch_sizes and args[2] == -1:
            return self._flatten(node, source, 1, -1)
        if target in ("mean", torch.mean):
            return self._mean(node, source)
        return None

    def _find_batch_sizes(self, node: fx.Node) -> None:
        """Remember nodes that ask for the number of examples only, which touches no channel."""
        sizes = (node.target == "size" and len(node.args) == 1) or (node.target is getattr and node.args[1:] == ("shape",))
        if node.target == "size" and node.args[1:] == (0,):
            self._batch_sizes.add(node)
        elif sizes and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
            self._batch_sizes.update([node, *node.users])

    def _addition(self, node: fx.Node) -> Step | None:
        if node.target in (operator.iadd, "add_"):
            self._check_in_place(node)
        if len(node.args) != 2 or node.kwargs or not all(each in self._known for each in node.args):
            return None
        first, second = node.all_input_nodes * (2 if len(node.all_input_nodes) == 1 else 1)
        a, b = self._steps[self._known[first]], self._steps[self._known[second]]
        if self._shapes[first] != self._shapes[second] or a.axis != b.axis:
            return None
        self._ties.append((a.units, b.units))
        return self._carried(node, Op.ADD)

    def _concatenation(self, node: fx.Node) -> Step | None:
        given = _given(node, "tensors", "dim", skip=0)
        parts, axis = given["tensors"], given.get("dim", 0) % len(self._shapes[node])
        if not isinstance(parts, list | tuple) or not all(part in self._known for part in parts):
            return None
        inputs = tuple(self._known[part] for part in parts)
        if any(self._steps[each].axis != axis for each in inputs):
            return None
        units = torch.cat([self._steps[each].units for each in inputs])
        return Step(Op.TAKE, inputs, units, axis, len(node.users) == 1, take=torch.arange(len(units)))

    def _flatten(self, node: fx.Node, source: Step, start: int, end: int) -> Step | None:
        shape = self._shapes[node.all_input_nodes[0]]
        start, end, axis = start % len(shape), end % len(shape), source.axis
        if start == 0:
            return None
        if not start <= axis <= end:
            return self._carried(node, Op.SAME, axis=axis if axis < start else axis - (end - start))
        before, after = prod(shape[start:axis]), prod(shape[axis + 1 : end + 1])
        take = torch.arange(len(source.units)).repeat_interleave(after).repeat(before)
        inputs = (self._known[node.args[0]],)
        return Step(Op.TAKE, inputs, source.units[take], start, len(node.users) == 1, take=take)

    def _mean(self, node: fx.Node, source: Step) -> Step | None:
        given = _given(node, "dim", "keepdim")
        length = len(self._shapes[node.all_input_nodes[0]])
        asked = given.get("dim", 0)
        dims = {dim % length for dim in ([asked] if isinstance(asked, int) else asked)}
        if dims & {0, source.axis} or not dims or given.keys() - {"dim", "keepdim"}:
            return None
        below = 0 if given.get("keepdim") else sum(dim < source.axis for dim in dims)
        return self._carried(node, Op.SAME, axis=source.axis - below)

    def _source(self, node: fx.Node) -> Step | None:
        """Return the step whose result is the node's first argument, if its channels are known."""
        known = self._known.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        return None if known is None else self._steps[known]

    def _carried(
        self, node: fx.Node, op: Op, *, axis: int | None = None, layer: str = "", function: Function | None = None
    ) -> Step:
        """Return a step that carries the channels of its input on."""
        inputs = tuple(self._known[each] for each in node.args if isinstance(each, fx.Node))
        source = self._steps[inputs[0]]
        axis = source.axis if axis is None else axis
        return Step(op, inputs, source.units, axis, len(node.users) == 1, layer, function)

    def _check_in_place(self, node: fx.Node) -> None:
        """Make sure that what a node changes in place is read by nothing else, under no other name either.

        Raises:
            _Unclear: it may be.
        """
        changed = node.args[0]
        self._exclusive.add(node)
        while isinstance(changed, fx.Node) and len(changed.users) == 1:
            if changed in self._known:
                if self._steps[self._known[changed]].op in (Op.LAYER, Op.BATCH, Op.GROUP, Op.ADD):
                    return
            elif changed.op == "call_module" and isinstance(self._module.get_submodule(str(changed.target)), FRESH):
                return
            else:
                break
            changed = changed.args[0] if changed.args else None
        raise _Unclear


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of each result."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(result.shape)
        return result


def _labels(count: int, ties: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the lowest of the units that each unit is tied to, directly or through others."""
    labels = torch.arange(count)
    while True:
        before = labels.clone()
        for a, b in ties:
            lowest = torch.minimum(labels[a], labels[b])
            labels.scatter_reduce_(0, a, lowest, "amin").scatter_reduce_(0, b, lowest, "amin")
        if torch.equal(labels, before):
            return labels


def _changed(layer: nn.Module) -> bool:
    """Whether a layer does something besides what its class does."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)


def _padded(layer: nn.Module) -> bool:
    padding = getattr(layer, "padding", 0)
    return padding != "valid" and padding not in (0, (0,), (0, 0), (0, 0, 0))


def _mutates(node: fx.Node) -> bool:
    """Whether an operation may change its input in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    functional = getattr(node.target, "__module__", "") == "torch.nn.functional" and any(each is True for each in node.args)
    named = (name.endswith("_") and not name.endswith("__")) or name in ("setitem", *_IN_PLACE_OPERATORS)
    return functional or named or node.kwargs.get("inplace") is True or "out" in node.kwargs


def _given(node: fx.Node, *names: str, skip: int = 1) -> dict[str, Any]:
    """Return arguments by name, without the first ones."""
    return dict(zip(names, node.args[skip:], strict=False)) | node.kwargs


def _call(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    return function(x, *args, **kwargs)
