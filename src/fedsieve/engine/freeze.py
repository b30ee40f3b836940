"""Any state of a method as bytes, in the open safetensors format: nothing in it is code.

A state is a frozen dataclass of `Params`, `Masks`, tensors, `Streams`, numbers, strings, bytes, None, and of tuples, lists or
mappings of these.
Tensors are stored as safetensors, the rest as JSON in its metadata. A dataclass is named by its class, which is looked up among
the names of the method's own module when it is read: a file cannot name any other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedsieve.params import Layout, Masks, Params
from fedsieve.streams import Streams


def freeze(value: Any) -> bytes:
    """Return a state as bytes. TypeError for what a state cannot hold."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(value, tensors))
    stored = set[int]()
    for name, tensor in tensors.items():  # the format refuses tensors that share memory
        place = tensor.untyped_storage().data_ptr()
        if place in stored:
            tensors[name] = tensor.clone()
        stored.add(place)
    return save(tensors, metadata={"state": tree})


def thaw(frozen: bytes, layout: Layout, module: str) -> Any:
    """Return the state again, for a model of this layout; `module` is the module of the method."""
    size = int.from_bytes(frozen[:8], "little")
    tree = json.loads(json.loads(frozen[8 : 8 + size])["__metadata__"]["state"])
    return _decode(tree, load(frozen), layout, vars(sys.modules[module]))


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, bytes):
        return {"bytes": _encode(torch.from_numpy(np.frombuffer(value, dtype=np.uint8).copy()), tensors)}
    if isinstance(value, Params):
        return {"params": _encode(value.flat, tensors)}
    if isinstance(value, Masks):
        return {"masks": _encode(torch.from_numpy(np.packbits(value.kept.numpy())), tensors)}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "class": type(value).__name__,
            "fields": {f.name: _encode(getattr(value, f.name), tensors) for f in fields(value)},
        }
    raise TypeError(f"a state cannot hold a {type(value).__name__}")


def _decode(tree: Any, tensors: Mapping[str, Tensor], layout: Layout, names: Mapping[str, Any]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "class" in tree:
        cls = Streams if tree["class"] == "Streams" else names[tree["class"]]
        return cls(**{name: _decode(item, tensors, layout, names) for name, item in tree["fields"].items()})
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "bytes":
        return _decode(content, tensors, layout, names).numpy().tobytes()
    if kind == "params":
        return Params(layout, _decode(content, tensors, layout, names))
    if kind == "masks":
        bits = np.unpackbits(_decode(content, tensors, layout, names).numpy(), count=layout.maskable)
        return Masks(layout, torch.from_numpy(bits.astype(bool)))
    if kind == "mapping":
        return {_decode(k, tensors, layout, names): _decode(v, tensors, layout, names) for k, v in content}
    items = [_decode(item, tensors, layout, names) for item in content]
    return tuple(items) if kind == "tuple" else items
