"""Write a trained model for use elsewhere, and read it back.

packed.safetensors holds for each tensor NAME with zeros in it

    NAME.kept   uint8, one bit an element in row-major order, first element in the highest bit; 1 = not zero
    NAME        float32 (kept,), the elements that are not zero, in order

and every other tensor as it is. Its metadata holds the shapes of the packed ones as JSON under `shapes`.
"""

from __future__ import annotations

import io
import json
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedsieve import files
from fedsieve.errors import DataError, UsageError


def export(folder: Path, out: Path) -> tuple[Path, Path]:
    """Write the final model of a run folder packed and as a PyTorch state dict; return both paths.

    Raises:
        UsageError: the folder holds no final model.
    """
    source = folder / "model.safetensors"
    if not source.is_file():
        raise UsageError(f"{folder} holds no model.safetensors: it is no run folder, or its run has not ended.")
    tensors = load_file(source)
    out.mkdir(parents=True, exist_ok=True)
    packed, plain = out / "packed.safetensors", out / "model.pt"
    files.replace(packed, pack(tensors))
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    files.replace(plain, buffer.getvalue())
    return packed, plain


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Return tensors as bytes in the packed form; a tensor is packed where that is smaller."""
    content, shapes = {}, {}
    for name, tensor in tensors.items():
        kept = tensor.numpy().reshape(-1) != 0
        if tensor.dtype == torch.float32 and kept.size - int(kept.sum()) > kept.size / 32:
            content[name] = torch.from_numpy(tensor.numpy().reshape(-1)[kept])
            content[f"{name}.kept"] = torch.from_numpy(np.packbits(kept))
            shapes[name] = list(tensor.shape)
        else:
            content[name] = tensor
    return files.safetensors(content, {"format": "fedsieve-packed-1", "shapes": json.dumps(shapes)})


def load(path: Path) -> dict[str, Tensor]:
    """Read packed.safetensors back as a state dict with zeros.

    Raises:
        DataError: the file is not of this form, or its parts contradict one another.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, content = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors = {name: tensor for name, tensor in content.items() if not name.endswith(".kept")}
        for name, shape in json.loads(metadata["shapes"]).items():
            kept = np.unpackbits(content[f"{name}.kept"].numpy(), count=prod(shape)).astype(bool)
            whole = np.zeros(prod(shape), dtype=np.float32)
            whole[kept] = content[name].numpy()
            tensors[name] = torch.from_numpy(whole).view(shape)
    except Exception as error:
        raise DataError(f"{path} is no packed model: {error}") from None
    return tensors
