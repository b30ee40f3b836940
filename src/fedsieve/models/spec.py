"""A network as a function of named parameters, and the catalogue of networks to choose from."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsieve.errors import UsageError
from fedsieve.init.schemes import glorot_uniform, kaiming_uniform
from fedsieve.models import tabular, text, vision
from fedsieve.params import Kind, Layout, Masks, Params, Slot
from fedsieve.settings import Model
from fedsieve.streams import Streams

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> mean loss, a scalar; a top-level function, so that it can be pickled for worker processes"""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
PRUNABLE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *RECURRENT, nn.MultiheadAttention)
"""layers whose weights may be pruned; an attention's are its linear projections"""
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
SCHEMES = {"kaiming": kaiming_uniform, "glorot": glorot_uniform}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of scores (B, classes) and targets (B,), or (B, T, classes) and (B, T).

    Targets of -100 are left out of the mean, for sequences padded to one length.
    """
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A network as a function of named parameters. Make one with `ModelSpec.of` or `build`."""

    name: str
    module: nn.Module
    """template; its own values are not part of any state"""
    layout: Layout
    loss: Loss
    flops: Mapping[str, int]
    """slot name -> floating-point operations (2 x multiply-adds) of one example's forward pass spent in that slot"""
    example: Tensor
    """one input, shape (1, ...)"""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        example: Tensor,
        *,
        loss: Loss = cross_entropy,
        maskable: Literal["weights", "all"] = "weights",
        dense: Sequence[str] = (),
        name: str | None = None,
    ) -> ModelSpec:
        """Describe a module: its slots in its own order, and the cost of each, measured by one forward pass.

        The module is copied and never changed. Slots are its trained parameters and its persistent floating-point buffers,
        all float32, tied ones once under their first name. Frozen parameters (requires_grad False), integer and
        non-persistent buffers are no slots: they are part of the template, equal on every machine that holds it. The block of a
        slot is the rank of the first component of its name.

        FLOPs: convolution 2 * output positions * numel(weight), linear and recurrent 2 * positions * numel(weight), attention
        as its projections. Biases, normalisation, lookups, products of activations and parameters used outside of these
        layers count 0.

        Args:
            module: any module that maps a batch to scores; on any device.
            example: one input, shape (1, ...), float32 or int64.
            loss: mean loss of a batch.
            maskable: "weights" for the weights of convolution, linear, recurrent and attention layers; "all" for every
                trained tensor.
            dense: names of tensors that are never pruned.
            name: what to call it; by default the name of its class.

        Raises:
            UsageError: the module does not run on the example, cannot be copied, has no trained float32 parameter, or lacks a
                name given in `dense`.
        """
        name = name or type(module).__name__
        if maskable not in ("weights", "all"):
            raise UsageError(f"maskable = {maskable!r}: use 'weights' or 'all'")
        template = _copy(name, module)
        tensors = {key: tensor for key, _, tensor in _tensors(template)}
        _check_tensors(name, tensors, dense)
        first = dict.fromkeys(key.partition(".")[0] for key in tensors)
        blocks = {component: rank for rank, component in enumerate(first)}
        slots = []
        for key, owner, tensor in _tensors(template):
            kind = _kind(key, owner, tensor)
            prunable = kind is Kind.WEIGHT and isinstance(owner, PRUNABLE) if maskable == "weights" else kind is not Kind.BUFFER
            slots.append(Slot(key, tuple(tensor.shape), kind, prunable and key not in dense, blocks[key.partition(".")[0]]))
        example = example.cpu()
        return cls(name, template, Layout.of(slots), loss, _measure(name, template, example, tensors), example)

    def trains_on_one(self) -> bool:
        """Return whether a step of training may take one example: BatchNorm refuses it where a channel is a single number."""
        norms = nn.modules.batchnorm._BatchNorm
        if not any(isinstance(layer, norms) for layer in self.module.modules()):
            return True
        module = deepcopy(self.module).eval()
        for layer in module.modules():
            layer.training = isinstance(layer, norms)
        try:
            with torch.no_grad():
                module(self.example)
        except ValueError:  # in evaluation it ran, when the spec was made
            return False
        return True

    def initial(self, scheme: Literal["module", "kaiming", "glorot"], streams: Streams) -> Params:
        """Return the start of a federation.

        "module": the template's own values, whatever the seed. "kaiming" and "glorot" draw from the streams (see
        `fedsieve.init.schemes`); parameters and buffers that belong to none of PyTorch's convolution, linear, recurrent,
        attention, embedding and normalisation layers (a bare nn.Parameter, a PReLU) have no fan and keep the template's values.
        """
        start = Params.zeros(self.layout)
        with torch.no_grad():
            for key, _, tensor in _tensors(self.module):
                start[key].copy_(tensor)
            if scheme == "module":
                return start
            if scheme not in SCHEMES:
                raise UsageError(f"init = {scheme!r}: use 'module', 'kaiming' or 'glorot' (model.init)")
            tables = [key for key, owner, _ in _tensors(self.module) if isinstance(owner, EMBEDDINGS)]
            drawn = SCHEMES[scheme](self.layout, streams, embeddings=tables)
            for key, owner, _ in _tensors(self.module):
                if isinstance(owner, (*PRUNABLE, *EMBEDDINGS, *NORMS)):
                    start[key].copy_(drawn[key])
                if isinstance(owner, EMBEDDINGS) and owner.padding_idx is not None:
                    start[key][owner.padding_idx] = 0  # it gets no gradient: a start other than 0 would stay
        return start

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return self.layout.trainable

    @property
    def norms(self) -> list[str]:
        """Names of the classes of its normalisation layers, each once."""
        return list(dict.fromkeys(type(layer).__name__ for layer in self.module.modules() if isinstance(layer, NORMS)))

    @property
    def has_statistics(self) -> bool:
        """Whether BatchNorm keeps statistics in it."""
        norms = (layer for layer in self.module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))
        return any(layer.running_mean is not None for layer in norms)

    def density_flops(self, masks: Masks) -> int:
        """Return the forward FLOPs of one example under the masks: each maskable slot's FLOPs times its density."""
        total, kept = 0, masks.counts()
        for slot in self.layout.slots:
            flops = self.flops[slot.name]
            total += flops * kept[slot.name] // slot.numel if slot.maskable else flops
        return total


def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield (name, layer that holds it, tensor) of each slot, in the module's own order, tied tensors once."""
    persistent = module.state_dict().keys()
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        trained = ((key, t) for key, t in owner.named_parameters(recurse=False) if t.requires_grad)
        buffers = ((key, t) for key, t in owner.named_buffers(recurse=False) if t.is_floating_point())
        for local, tensor in (*trained, *buffers):
            key = f"{prefix}.{local}" if prefix else local
            if key in persistent and id(tensor) not in seen:
                seen.add(id(tensor))
                yield key, owner, tensor


def _kind(key: str, owner: nn.Module, tensor: Tensor) -> Kind:
    if not isinstance(tensor, nn.Parameter):
        return Kind.BUFFER
    if isinstance(owner, NORMS):
        return Kind.NORM
    if "bias" in key.rpartition(".")[2]:
        return Kind.BIAS
    return Kind.WEIGHT if tensor.ndim > 1 else Kind.NORM  # a vector that is no bias scales: PReLU, layer scale, own norms


def _copy(name: str, module: nn.Module) -> nn.Module:
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        raise UsageError(f"model {name!r} has lazy layers of unknown shape: run one example through it first")
    try:
        return deepcopy(module).cpu()
    except Exception as error:
        raise UsageError(f"model {name!r} cannot be copied, so no client can have one: {_one_line(error)}") from error


def _check_tensors(name: str, tensors: Mapping[str, Tensor], dense: Sequence[str]) -> None:
    if not any(isinstance(tensor, nn.Parameter) for tensor in tensors.values()):
        raise UsageError(f"model {name!r} has no trained parameter: set requires_grad on those to train")
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise UsageError(f"{key} of model {name!r} is {tensor.dtype}: parameters are float32, call .float() on the model")
    for key in dense:
        if key not in tensors:
            near = get_close_matches(key, tensors, n=3, cutoff=0.3) or list(tensors)[:3]
            raise UsageError(f"model {name!r} has no tensor {key!r} (model.dense); nearest names: {', '.join(near)}")


def _measure(name: str, template: nn.Module, example: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Run one example forward and return the FLOPs of each slot."""
    names = {id(tensor): key for key, tensor in tensors.items()}
    flops = dict.fromkeys(tensors, 0)

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for weight, multiply_adds in _multiply_adds(layer, args, kwargs, output):
            if id(weight) in names:
                flops[names[id(weight)]] += 2 * multiply_adds

    hooks = [layer.register_forward_hook(count, with_kwargs=True) for layer in template.modules()]
    try:
        _forward(name, template, example)
    finally:
        for hook in hooks:
            hook.remove()
    return flops


def _multiply_adds(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Iterator[tuple[Tensor | None, int]]:
    """Yield (weight, multiply-adds) of one call of a layer."""
    if isinstance(layer, CONVOLUTIONS):
        yield layer.weight, output.numel() // layer.out_channels * layer.weight.numel()
    elif isinstance(layer, TRANSPOSED):
        inputs = args[0] if args else kwargs["input"]
        yield layer.weight, inputs.numel() // layer.in_channels * layer.weight.numel()
    elif isinstance(layer, nn.Linear):
        yield layer.weight, output.numel() // layer.out_features * layer.weight.numel()
    elif isinstance(layer, RECURRENT):
        states = output[0] if isinstance(output, tuple) else output
        positions = states.data.numel() // states.data.shape[-1]  # .data: of a tensor, or of a packed sequence
        for weight in layer.parameters(recurse=False):
            if weight.ndim > 1:
                yield weight, positions * weight.numel()
    elif isinstance(layer, nn.MultiheadAttention):
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        queries, keys, values = (given[part].numel() // given[part].shape[-1] for part in ("query", "key", "value"))
        square = layer.embed_dim**2
        yield layer.in_proj_weight, (queries + keys + values) * square
        yield layer.q_proj_weight, queries * square
        yield layer.k_proj_weight, keys * layer.embed_dim * (layer.kdim or 0)
        yield layer.v_proj_weight, values * layer.embed_dim * (layer.vdim or 0)
        yield layer.out_proj.weight, queries * square


def _forward(name: str, template: nn.Module, example: Tensor) -> Tensor:
    """Run the example in evaluation mode; modes and the global random state are as before."""
    modes = [(layer, layer.training) for layer in template.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            output = template.eval()(example)
    except Exception as error:
        raise UsageError(
            f"model {name!r} does not run on one example of shape {tuple(example.shape)}, {example.dtype}:\n"
            f"{_one_line(error)}\n"
            "Choose a model made for such data (model.name), or other data (data.name)."
        ) from error
    finally:
        for layer, training in modes:
            layer.training = training
    if not isinstance(output, Tensor):
        raise UsageError(f"model {name!r} returns {type(output).__name__}; it must return one tensor of scores")
    return output


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the list of models, every field a text to show."""

    name: str
    title: str
    input: str
    parameters: str
    source: str
    options: tuple[str, ...]


CATALOGUE: tuple[Entry, ...] = (
    Entry("mlp", "hidden layers of 128 and 128", "any shape", "118,282 (1x28x28, 10 classes)", "arXiv 2204.12430", ("hidden",)),
    Entry("lenet", "LeNet-5", "images from 16x16", "61,706 (1x28x28, 10 classes)", "LeCun et al. 1998", ("norm",)),
    Entry("cnn", "FedAvg's CNN", "images from 4x4", "1,663,370 (1x28x28, 10 classes)", "arXiv 1602.05629", ()),
    Entry(
        "cnn6", "FedSparsify CNN", "images from 8x8", "1,609,930 (3x32x32, 10 classes)", "arXiv 2204.12430", ("norm", "dropout")
    ),
    Entry("resnet8", "CIFAR ResNet-8", "images from 8x8", "78,042 (3x32x32, 10 classes)", "arXiv 1512.03385", ("norm",)),
    Entry("resnet18", "CIFAR ResNet-18", "images from 8x8", "11,173,962 (3x32x32, 10 classes)", "arXiv 1512.03385", ("norm",)),
    Entry("resnet20", "CIFAR ResNet-20", "images from 8x8", "272,474 (3x32x32, 10 classes)", "arXiv 1512.03385", ("norm",)),
    Entry("vgg11", "CIFAR VGG-11", "images from 32x32", "9,231,114 (3x32x32, 10 classes)", "arXiv 1409.1556", ("norm",)),
    Entry("vgg16", "CIFAR VGG-16", "images from 32x32", "14,728,266 (3x32x32, 10 classes)", "arXiv 1409.1556", ("norm",)),
    Entry("tabular", "layers of 64 and 32", "features", "3,042 (13 features, 2 classes)", "fedsieve", ("hidden", "dropout")),
    Entry("charlstm", "two LSTM layers of 256", "tokens", "815,945 (sequences of 65 characters)", "arXiv 1602.05629", ()),
)
"""the built-in models, as `fedsieve list models` shows them; parameters are the trained ones, with the default options"""

_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": tabular.mlp,
    "lenet": vision.lenet,
    "cnn": vision.cnn,
    "cnn6": vision.cnn6,
    "resnet8": vision.resnet8,
    "resnet18": vision.resnet18,
    "resnet20": vision.resnet20,
    "vgg11": vision.vgg11,
    "vgg16": vision.vgg16,
    "tabular": tabular.tabular,
    "charlstm": text.charlstm,
}


def build(settings: Model, shape: tuple[int, ...], classes: int, tokens: bool = False) -> ModelSpec:
    """Build the model that the settings name, for examples of this shape.

    A name with a colon is your own: `package.module:callable` is imported and called with those of the keyword arguments
    shape, classes, norm, hidden and dropout (the last three where the settings give them) that its signature names; it
    returns an nn.Module. Making the module draws from a random state of its own, always the same, so that every process has
    the same template.

    Args:
        settings: name and options of the model.
        shape: shape of one example, without the batch.
        classes: number of classes; for text, the size of the vocabulary.
        tokens: examples are int64 tokens rather than float32 values.

    Raises:
        UsageError: unknown name, an option that the model does not take, or a model that does not fit the data.
    """
    maker = _own(settings.name) if ":" in settings.name else _built_in(settings.name, shape, tokens)
    accepted = inspect.signature(maker).parameters
    options: dict[str, Any] = {"norm": settings.norm, "hidden": settings.hidden, "dropout": settings.dropout}
    given = {option: value for option, value in options.items() if value not in ("default", (), None)}
    for option, value in given.items():
        if option not in accepted:
            takers = ", ".join(entry.name for entry in CATALOGUE if option in entry.options)
            raise UsageError(
                f"model {settings.name!r} has no option {option!r}, given as {value!r} (model.{option}).\n"
                f"Models with it: {takers}. Leave it out, or set model.name to one of these."
            )
    arguments = {key: value for key, value in {"shape": shape, "classes": classes, **given}.items() if key in accepted}
    missing = [p.name for p in accepted.values() if p.default is p.empty and p.kind not in VARIADIC and p.name not in arguments]
    if missing:
        raise UsageError(
            f"model {settings.name!r} needs {', '.join(missing)}: it is given the keywords shape and classes, and norm,\n"
            "hidden and dropout where they are set (model.norm, ...). Give other arguments a default."
        )
    example = torch.zeros((1, *shape), dtype=torch.int64 if tokens else torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = maker(**arguments)
    if ":" in settings.name:
        _check_own(settings.name, module, example, classes)
    return ModelSpec.of(module, example, maskable=settings.maskable, dense=settings.dense, name=settings.name)


def _built_in(name: str, shape: tuple[int, ...], tokens: bool) -> Callable[..., nn.Module]:
    if name not in _MAKERS:
        near = get_close_matches(name, _MAKERS, n=1, cutoff=0.4)
        raise UsageError(
            f"unknown model {name!r} (model.name){f'; did you mean {near[0]!r}?' if near else ''}\n"
            f"There are {', '.join(_MAKERS)}, and your own as package.module:callable."
        )
    if tokens != (name == "charlstm"):
        takes, has = ("tokens", "values") if name == "charlstm" else ("values", "tokens")
        raise UsageError(
            f"model {name!r} takes {takes}; one example of the data is {has} of shape {shape}.\n"
            "Set model.name = 'charlstm' for text and another for images and features (`fedsieve list models`)."
        )
    return _MAKERS[name]


def _own(name: str) -> Callable[..., nn.Module]:
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in path.split(".")):
        raise UsageError(f"model.name = {name!r}: write it as package.module:callable, for example nets.small:SmallNet")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise UsageError(
            f"model.name = {name!r}: cannot import {path!r}: {_one_line(error)}\n"
            "Run it from the folder of your file, or put that into PYTHONPATH."
        ) from error
    maker = getattr(module, attribute, None)
    if not callable(maker):
        near = get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"model.name = {name!r}: {path!r} has no callable {attribute!r}{hint}")
    made: Callable[..., nn.Module] = maker
    return made


def _check_own(name: str, module: object, example: Tensor, classes: int) -> None:
    if not isinstance(module, nn.Module):
        raise UsageError(f"model.name = {name!r}: it returns {type(module).__name__}; it must return a torch.nn.Module")
    output = _forward(name, module, example)
    if output.ndim < 2 or len(output) != 1 or output.shape[-1] < classes:
        raise UsageError(
            f"model.name = {name!r}: one example gives scores of shape {tuple(output.shape)};\n"
            f"with {classes} classes (1, {classes}) is needed, or (1, length, {classes}) for sequences."
        )
