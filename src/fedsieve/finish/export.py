"""Write a trained model for use elsewhere, and read it back.

packed.safetensors holds for each tensor NAME with zeros in it

    NAME        float32 or float16 (kept,), the elements that are not zero, in row-major order

and where they stand in one of two ways, whichever is smaller:

    NAME.kept   uint8, one bit an element, the first in the highest bit; 1 = not zero
    NAME.gaps   uint8; b < 255: b zeros, then an element; 255: 255 zeros and no element yet. Fewer than 255 zeros follow the
                last byte

and every other tensor as it is. Its metadata holds the shapes of the packed ones as JSON under `shapes`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedsieve import files
from fedsieve.errors import DataError, UsageError

FORMAT = "fedsieve-packed-2"
READABLE = (FORMAT, "fedsieve-packed-1")
"""formats of packed.safetensors that `load` takes; the first version had no gaps and no float16"""
STEP = 255
"""zeros that a byte of gaps stands for which no element follows"""
Values = Literal["fp32", "fp16"]


def export(folder: Path, out: Path, values: Values = "fp32") -> tuple[Path, Path]:
    """Write the final model of a run folder packed and as a PyTorch state dict; return both paths.

    Raises:
        UsageError: the folder holds no final model, or fp16 cannot hold its values.
    """
    tensors = final(folder)
    content = pack(tensors, values)
    out.mkdir(parents=True, exist_ok=True)
    packed, plain = out / "packed.safetensors", out / "model.pt"
    files.replace(packed, content)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    files.replace(plain, buffer.getvalue())
    return packed, plain


def final(folder: Path) -> dict[str, Tensor]:
    """Read the final model of a run folder.

    Raises:
        UsageError: the folder holds none.
    """
    source = folder / "model.safetensors"
    if not source.is_file():
        raise UsageError(f"{folder} holds no model.safetensors: it is no run folder, or its run has not ended.")
    return load_file(source)


def pack(tensors: Mapping[str, Tensor], values: Values = "fp32", metadata: Mapping[str, str] | None = None) -> bytes:
    """Return tensors as bytes in the packed form; a tensor is packed where that is smaller.

    Args:
        tensors: by name.
        values: of packed tensors; what fp16 rounds to zero is not kept. Other tensors stay as they are.
        metadata: of the file; its format is `FORMAT` unless given here.

    Raises:
        UsageError: fp16 is asked for, and a value is larger than 65,504.
    """
    content, shapes = {}, {}
    for name, tensor in tensors.items():
        elements = tensor.numpy().reshape(-1)
        if values == "fp16" and tensor.dtype == torch.float32:
            with np.errstate(over="ignore"):
                elements = elements.astype(np.float16)
        kept = elements != 0
        count = int(kept.sum())
        bits = -(-kept.size // 8)  # bytes, at one bit an element
        if tensor.dtype != torch.float32 or (kept.size - count) * elements.itemsize <= bits:
            content[name] = tensor
            continue
        if not np.array_equal(np.isfinite(elements), np.isfinite(tensor.numpy().reshape(-1))):
            raise UsageError(f"{name} has a value beyond 65,504, the largest of fp16: export it with --values fp32.")
        content[name] = torch.from_numpy(elements[kept])
        gaps = _gaps(kept) if count < bits else None
        if gaps is not None and len(gaps) < bits:
            content[f"{name}.gaps"] = torch.from_numpy(gaps)
        else:
            content[f"{name}.kept"] = torch.from_numpy(np.packbits(kept))
        shapes[name] = list(tensor.shape)
    return files.safetensors(content, {"format": FORMAT, **(metadata or {}), "shapes": json.dumps(shapes)})


def load(path: Path) -> dict[str, Tensor]:
    """Read packed.safetensors back as a state dict with zeros. It takes at most 1,020 bytes of memory a byte of the file.

    Raises:
        DataError: the file is not of this form, or its parts contradict one another.
    """
    return read(path, READABLE)[0]


def read(path: Path, formats: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file in the packed form as a state dict with zeros, and its metadata. See `load`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, content = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") not in formats:
            raise ValueError(f"its format is {metadata.get('format')}, not {' or '.join(formats)}")
        for name, shape in json.loads(metadata["shapes"]).items():
            content[name] = _whole(content, name, shape)
    except Exception as error:
        raise DataError(f"{path} is no packed model: {error}") from None
    return content, metadata


def _whole(content: dict[str, Tensor], name: str, shape: list[int]) -> Tensor:
    """Take a packed tensor's places out of the content and return it with its zeros."""
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"{name} has the shape {shape}")
    size, values = prod(shape), content[name]
    bits, gaps = (content.pop(f"{name}.{way}", None) for way in ("kept", "gaps"))
    if values.dtype not in (torch.float32, torch.float16) or values.dim() != 1 or (bits is None) is (gaps is None):
        raise ValueError(f"{name} needs float32 or float16 values, and kept or gaps")
    places = bits if gaps is None else gaps
    if places is None or places.dtype != torch.uint8 or places.dim() != 1:
        raise ValueError(f"where the elements of {name} stand is not uint8")
    found = _from_gaps(places.numpy(), size) if gaps is not None else _from_bits(places.numpy(), size)
    if found is None or len(found) != len(values):
        raise ValueError(f"where the elements of {name} stand does not fit its {len(values)} values and its shape {shape}")
    whole = np.zeros(size, dtype=np.float32)
    whole[found] = values.numpy()
    return torch.from_numpy(whole).view(shape)


def _gaps(kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Code where the elements are that are True, as the head of this module says."""
    ends = np.concatenate([[-1], np.flatnonzero(kept), [kept.size]])
    zeros = np.diff(ends) - 1
    lengths = zeros // STEP + 1
    gaps = np.full(int(lengths.sum()) - 1, STEP, dtype=np.uint8)
    gaps[np.cumsum(lengths[:-1]) - 1] = zeros[:-1] % STEP
    return gaps


def _from_gaps(gaps: NDArray[np.uint8], size: int) -> NDArray[np.int64] | None:
    """Return where the elements are of a tensor of a size; None if the gaps do not fit it."""
    element = gaps < STEP
    ends = np.cumsum(gaps + element, dtype=np.int64)
    covered = int(ends[-1]) if len(ends) else 0
    return ends[element] - 1 if 0 <= size - covered < STEP else None


def _from_bits(bits: NDArray[np.uint8], size: int) -> NDArray[np.int64] | None:
    return np.flatnonzero(np.unpackbits(bits, count=size)) if len(bits) == -(-size // 8) else None
