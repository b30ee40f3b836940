"""Files that are whole or not there, and the same for the same content."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def replace(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one: to a temporary file beside it, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file with a sorted header: the library writes metadata in an order that varies between calls."""
    from safetensors.torch import save

    saved = save(dict(tensors), metadata=dict(metadata))
    size = int.from_bytes(saved[:8], "little")
    header = json.dumps(json.loads(saved[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + saved[8 + size :]
