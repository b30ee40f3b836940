"""Write a trained model without its dead channels and neurons, and read it back as a module.

compact.safetensors is the state dict of the small network; its metadata says how to build the large one, whose module then
takes the widths of the tensors. compact.json holds the widths of each layer, parameters and FLOPs, before and after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fedsieve import files
from fedsieve.errors import DataError, UsageError
from fedsieve.models.compact import compact, narrow
from fedsieve.models.spec import ModelSpec, build
from fedsieve.params import Kind, Masks, Params
from fedsieve.settings import Model

FORMAT = "fedsieve-compact-1"


def export(
    source: Path, out: Path, spec: ModelSpec, model: Model, classes: int, *, multiple: int = 1
) -> tuple[Path, Path, dict[str, Any]]:
    """Write the final model of a run folder without what is dead in it; return both paths and what compact.json holds.

    Args:
        source: the run folder.
        out: folder to write to.
        spec: the network of the run, as `build` makes it of the next two and the shape of its example.
        model: the settings of the run's model.
        classes: number of classes of the run's data.
        multiple: widths are multiples of it, or whole.

    Raises:
        UsageError: the folder holds no final model, or one of another network.
    """
    path = source / "model.safetensors"
    if not path.is_file():
        raise UsageError(f"{source} holds no model.safetensors: it is no run folder, or its run has not ended.")
    tensors = load_file(path)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {s.name: s.shape for s in spec.layout.slots}:
        raise UsageError(
            f"{path} holds another network than the one that {source / 'config.toml'} names.\n"
            "A run from Python brings its own module: call fedsieve.models.compact.compact on it there."
        )
    params = Params(spec.layout, torch.cat([tensors[slot.name].flatten() for slot in spec.layout.slots]))
    small = compact(spec, params, Masks.full(spec.layout), training=False, multiple=multiple).spec
    sizes: dict[str, Any] = {
        "widths": _widths(spec, small),
        "parameters": {"before": spec.parameters, "after": small.parameters},
        "flops": {"before": sum(spec.flops.values()), "after": sum(small.flops.values())},
    }
    tokens = spec.example.dtype == torch.int64
    recipe = {"model": asdict(model), "shape": list(spec.example.shape[1:]), "classes": classes, "tokens": tokens}
    state = {name: tensor.clone() for name, tensor in small.module.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    weights, described = out / "compact.safetensors", out / "compact.json"
    files.replace(weights, files.safetensors(state, {"format": FORMAT, "recipe": json.dumps(recipe)}))
    files.replace(described, json.dumps(sizes, indent=2) + "\n")
    return weights, described, sizes


def load(path: Path) -> nn.Module:
    """Build the module of compact.safetensors, with its weights, in evaluation mode.

    A model of your own is imported, so its code must be found. The module is an ordinary one: keep it, train it, trace it.

    Raises:
        DataError: the file is not of this form.
        UsageError: a model of your own cannot be imported, or has become another.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recipe = json.loads(file.metadata()["recipe"])
        tensors = load_file(path)
        model = Model(**recipe["model"])
        shape, classes, tokens = tuple(recipe["shape"]), int(recipe["classes"]), bool(recipe["tokens"])
    except Exception as error:
        raise DataError(f"{path} is no compact model: {error}") from None
    spec = build(model, shape, classes, tokens=tokens)
    try:
        module = narrow(spec.module, {slot.name: tensors[slot.name] for slot in spec.layout.slots})
        module.load_state_dict(tensors)
        with torch.no_grad():
            module.eval()(spec.example)
    except (KeyError, RuntimeError) as error:
        raise UsageError(f"{path} was made of another model than {model.name} is now: {error}") from None
    return module


def _widths(large: ModelSpec, small: ModelSpec) -> Mapping[str, Any]:
    """Outputs and inputs of each layer, before and after."""
    return {
        slot.name.rpartition(".")[0]: {"before": list(slot.shape[:2]), "after": list(small.layout.named[slot.name].shape[:2])}
        for slot in large.layout.slots
        if slot.kind is Kind.WEIGHT and slot.name.endswith(".weight") and len(slot.shape) > 1
    }
