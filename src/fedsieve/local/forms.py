"""Forms of a model that the executor works on: a module whose tensors are views of one flat vector.

Parameters come and go as vectors in the order of the layout. A form holds them in the order that its arithmetic is fastest in:

    Whole   all weights, those of convolutions with the channels last
    Kept    of the layers that sparse kernels compute, the kept weights only
    Shrunk  one of these for the network without its dead channels and neurons
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from fedsieve.local.convolution import accelerate
from fedsieve.local.perceptron import Perceptron, obstacle, perceptron
from fedsieve.models.compact import Compact
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Kind, Layout, Masks, Slot
from fedsieve.settings import Local

FEW, LIGHT = 4, 2**13
"""inputs of a convolution, and weights of a linear layer, up to which it is computed by sparse kernels if any layer is"""

Support = tuple[Tensor, list[Tensor]]
"""1.0 where a weight is kept, 0.0 where pruned, of the first weights of a form; and its views, one a tensor"""


class Form(Protocol):
    """A model in some order."""

    module: nn.Module
    bound: Bound
    perceptron: Perceptron | None
    """the network with its training step written out, if it is one of linear layers"""

    def inward(self, flat: Tensor) -> Tensor:
        """Bring a vector of the layout, or its trainable part, into the order of the form, on its device."""

    def outward(self, flat: Tensor, into: Tensor) -> Tensor:
        """Bring a vector back, as a new tensor in main memory; dead units that the form leaves out are as in `into`."""

    def support(self, masks: Masks) -> Support | None:
        """Which weights stay zero though the form holds them; None if there are none."""


class Bound:
    """The flat vectors of a form: weights, and gradients of those that are trained.

    Args:
        module: whose tensors become views.
        slots: its slots in the order of the vector, buffers last.
        shapes: of their views.
        device: where the vectors are.
    """

    def __init__(
        self, module: nn.Module, slots: Sequence[Slot], shapes: Sequence[tuple[int, ...]], device: torch.device
    ) -> None:
        trained = [slot.kind is not Kind.BUFFER for slot in slots]
        self.trainable = sum(prod(shape) for shape, is_ in zip(shapes, trained, strict=True) if is_)
        self.weights = torch.zeros(sum(map(prod, shapes)), device=device)
        self.gradient = torch.zeros(self.trainable, device=device)
        views = _views(self.weights, shapes)
        self.parameters = [
            parameter for slot, view in zip(slots, views, strict=True) if (parameter := _bind(module, slot, view)) is not None
        ]
        self.counters = [b for b in module.buffers() if not b.is_floating_point() and b.dim() == 0]
        self.weight_views = [parameter.data for parameter in self.parameters]
        self.gradient_views = _views(self.gradient, [shape for shape, is_ in zip(shapes, trained, strict=True) if is_])


class Whole:
    """All weights of a model."""

    def __init__(self, spec: ModelSpec, local: Local) -> None:
        self.module = deepcopy(spec.module).to(local.device)
        if local.device == "cpu":
            accelerate(self.module, local)
        self._layout = layout = spec.layout
        self.bound = Bound(self.module, layout.slots, [slot.shape for slot in layout.slots], torch.device(local.device))
        self._images = [(slice(*layout.spans[slot.name]), slot.shape) for slot in _trained(layout) if len(slot.shape) == 4]
        self.perceptron: Perceptron | None = None
        if obstacle(spec, local) is None:
            names = [slot.name for slot in _trained(layout)]
            weights, gradients = (
                dict(zip(names, views, strict=True)) for views in (self.bound.weight_views, self.bound.gradient_views)
            )
            self.perceptron = perceptron(spec, weights, gradients)

    def inward(self, flat: Tensor) -> Tensor:
        """See `Form`."""
        flat = flat.to(self.bound.weights.device)
        moved = flat.clone() if self._images else flat
        for span, shape in self._images:
            if span.stop <= len(flat):
                _view(moved[span], shape).copy_(flat[span].view(shape))
        return moved

    def outward(self, flat: Tensor, into: Tensor) -> Tensor:
        """See `Form`."""
        moved = flat.clone()
        for span, shape in self._images:
            moved[span].view(shape).copy_(_view(flat[span], shape))
        return moved.cpu()

    def support(self, masks: Masks) -> Support:
        """See `Form`."""
        flat = self.inward(masks.kept.float())
        return flat, _views(flat, [slot.shape for slot in self._layout.masked_slots])


class Kept:
    """The kept weights of the named layers, and all of the others; these come first if they are masked."""

    def __init__(self, spec: ModelSpec, masks: Masks, names: Sequence[str]) -> None:
        from fedsieve.local.sparse_network import sparsify  # the compiler behind it takes a second to load

        self.module, layout = deepcopy(spec.module), spec.layout
        sparsify(self.module, masks, names)
        sparse = {f"{name}.weight" for name in names}
        slots = sorted(layout.slots, key=lambda slot: (slot.kind is Kind.BUFFER, not slot.maskable, slot.name in sparse))
        self._masked = [slot for slot in slots if slot.maskable and slot.name not in sparse]
        origins = []
        for slot in slots:
            begin, _ = layout.spans[slot.name]
            kept = masks[slot.name].flatten().nonzero().squeeze(1) if slot.name in sparse else None
            origins.append(_channels_last(slot.shape, begin) if kept is None else kept + begin)
        shapes = [(len(origin),) if slot.name in sparse else slot.shape for slot, origin in zip(slots, origins, strict=True)]
        self._layout, self._origin = layout, torch.cat(origins)
        self.perceptron: Perceptron | None = None
        self.bound = Bound(self.module, slots, shapes, torch.device("cpu"))

    def inward(self, flat: Tensor) -> Tensor:
        """See `Form`."""
        return flat[self._origin[: self.bound.trainable] if len(flat) == self._layout.trainable else self._origin]

    def outward(self, flat: Tensor, into: Tensor) -> Tensor:
        """See `Form`."""
        moved = torch.zeros(self._layout.size if len(flat) == len(self._origin) else self._layout.trainable)
        moved[self._origin[: len(flat)]] = flat
        return moved

    def support(self, masks: Masks) -> Support | None:
        """See `Form`."""
        if not self._masked:
            return None
        flat = masks.kept[self._origin[: sum(slot.numel for slot in self._masked)]].float()
        return flat, _views(flat, [slot.shape for slot in self._masked])


class Shrunk:
    """A network without its dead channels and neurons, in one of the other forms."""

    def __init__(self, small: Compact, masks: Masks, form: Form) -> None:
        self._small, self._masks, self._form = small, masks, form
        self.module, self.bound, self.perceptron = form.module, form.bound, form.perceptron

    def inward(self, flat: Tensor) -> Tensor:
        """See `Form`."""
        small = self._small.spec.layout
        size = small.trainable if len(flat) == self._masks.layout.trainable else small.size
        return self._form.inward(flat[self._small.origin[:size]])

    def outward(self, flat: Tensor, into: Tensor) -> Tensor:
        """See `Form`."""
        moved, small = into.clone(), self._form.outward(flat, into)
        moved[: len(self._masks.kept)].masked_fill_(~self._masks.kept, 0)
        left = ~self._small.filling[: len(small)]
        moved[self._small.origin[: len(small)][left]] = small[left]
        return moved

    def support(self, masks: Masks) -> Support | None:
        """See `Form`."""
        return self._form.support(self._small.shrink_masks(masks))


def sparse_layers(module: nn.Module, masks: Masks, local: Local) -> list[str]:
    """Return the names of the layers that sparse kernels compute: those whose masks are as sparse as the settings say.

    If there are any, light ones are too, whatever their density: a convolution of few inputs is no faster dense, and a small
    linear layer takes no time, but would break the chain. None, if all are small: on networks for a few dozen features the
    kernels take longer to load than they save.
    """
    uses = Counter(id(tensor) for each in module.modules() for tensor in each._parameters.values())
    names, light, weights, kept = [], [], 0, masks.counts()
    for name, layer in module.named_modules():
        slot = masks.layout.named.get(f"{name}.weight")
        linear = type(layer) is nn.Linear
        most = local.sparse_linear if linear else local.sparse_conv if _convolves(layer) else 0.0
        if slot is None or not slot.maskable or not most or uses[id(layer.weight)] > 1:
            continue
        if kept[slot.name] <= most * slot.numel:
            names.append(name)
            weights += slot.numel
        elif slot.numel <= LIGHT if linear else slot.shape[1] <= FEW:
            light.append(name)
    return [*names, *light] if names and weights >= local.sparse_least else []


def _convolves(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)


def _trained(layout: Layout) -> list[Slot]:
    return [slot for slot in layout.slots if slot.kind is not Kind.BUFFER]


def _channels_last(shape: tuple[int, ...], begin: int) -> Tensor:
    """Positions of a tensor's elements in the order that `_view` sees them in."""
    places = torch.arange(begin, begin + prod(shape)).view(shape)
    return (places.permute(0, 2, 3, 1) if len(shape) == 4 else places).flatten()


def _bind(module: nn.Module, slot: Slot, view: Tensor) -> nn.Parameter | None:
    """Make a tensor of the module a view of the flat vector; return it if it is trained."""
    path, _, leaf = slot.name.rpartition(".")
    owner = module.get_submodule(path)
    if slot.kind is Kind.BUFFER:
        owner._buffers[leaf] = view
        return None
    parameter: nn.Parameter = getattr(owner, leaf)
    parameter.data = view
    return parameter


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of the beginning of a flat vector, one a shape."""
    parts = torch.split(flat[: sum(map(prod, shapes))], [prod(shape) for shape in shapes])
    return [_view(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) != 4:
        return flat.view(shape)
    outputs, inputs, height, width = shape
    return flat.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
