"""Write a trained model without its dead channels and neurons, and read it back as a module.

compact.safetensors is the state dict of the small network; its metadata says how to build the large one, whose module then
takes the widths of the tensors. compact.json holds the widths of each layer, parameters and FLOPs, before and after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsieve import files
from fedsieve.errors import DataError, UsageError
from fedsieve.finish.export import final
from fedsieve.finish.recipe import Recipe
from fedsieve.models.compact import compact
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Kind, Masks, Params

FORMAT = "fedsieve-compact-1"


def export(source: Path, out: Path, spec: ModelSpec, recipe: Recipe, *, multiple: int = 1) -> tuple[Path, Path, dict[str, Any]]:
    """Write the final model of a run folder without what is dead in it; return both paths and what compact.json holds.

    Args:
        source: the run folder.
        out: folder to write to.
        spec: the network of the run.
        recipe: how to build that network.
        multiple: widths are multiples of it, or whole.

    Raises:
        UsageError: the folder holds no final model, or one of another network.
    """
    small = narrowed(source, spec, multiple)
    sizes: dict[str, Any] = {
        "widths": widths(spec, small),
        "parameters": {"before": spec.parameters, "after": small.parameters},
        "flops": {"before": sum(spec.flops.values()), "after": sum(small.flops.values())},
    }
    out.mkdir(parents=True, exist_ok=True)
    weights, described = out / "compact.safetensors", out / "compact.json"
    files.replace(weights, files.safetensors(state(small), {"format": FORMAT, "recipe": recipe.text()}))
    files.replace(described, json.dumps(sizes, indent=2) + "\n")
    return weights, described, sizes


def narrowed(source: Path, spec: ModelSpec, multiple: int = 1) -> ModelSpec:
    """Return the network of a run folder's final model without what is dead in it; its module holds the weights.

    Raises:
        UsageError: the folder holds no final model, or one of another network.
    """
    return compact(spec, final_params(source, spec), Masks.full(spec.layout), training=False, multiple=multiple).spec


def final_params(source: Path, spec: ModelSpec) -> Params:
    """Read the final model of a run folder as a vector. Errors as in `matching`."""
    tensors = matching(source, spec)
    return Params(spec.layout, torch.cat([tensors[slot.name].flatten() for slot in spec.layout.slots]))


def matching(source: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """Read the final model of a run folder.

    Raises:
        UsageError: the folder holds none, or one of another network than `spec`.
    """
    tensors = final(source)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {s.name: s.shape for s in spec.layout.slots}:
        raise UsageError(
            f"{source / 'model.safetensors'} holds another network than the one that {source / 'config.toml'} names.\n"
            "A run from Python brings its own module: call fedsieve.models.compact.compact on it there."
        )
    return tensors


def state(spec: ModelSpec) -> dict[str, Tensor]:
    """Return the state dict of a network, each tensor in memory of its own."""
    return {name: tensor.clone() for name, tensor in spec.module.state_dict().items()}


def load(path: Path) -> nn.Module:
    """Build the module of compact.safetensors, with its weights, in evaluation mode.

    A model of your own is imported, so its code must be found. The module is an ordinary one: keep it, train it, trace it.

    Raises:
        DataError: the file is not of this form.
        UsageError: a model of your own cannot be imported, or has become another.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')}, not {FORMAT}")
        tensors = load_file(path)
    except Exception as error:
        raise DataError(f"{path} is no compact model: {error}") from None
    return Recipe.read(metadata, path).module(tensors, path)[0]


def widths(large: ModelSpec, small: ModelSpec) -> Mapping[str, Any]:
    """Outputs and inputs of each layer, before and after."""
    return {
        slot.name.rpartition(".")[0]: {"before": list(slot.shape[:2]), "after": list(small.layout.named[slot.name].shape[:2])}
        for slot in large.layout.slots
        if slot.kind is Kind.WEIGHT and slot.name.endswith(".weight") and len(slot.shape) > 1
    }
