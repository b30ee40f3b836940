"""The run folder: what a run leaves on disk, and how it goes on after a crash.

config.toml         the resolved settings       records.jsonl   a row a round
partition.json      who holds what              summary.json    the end result
model.safetensors   the final model             checkpoint/     the last round saved, and what clients keep
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import xxhash

from fedsieve import files
from fedsieve.data.batches import Federation
from fedsieve.data.partition import Parts
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.engine.link import LinkState
from fedsieve.engine.states import ClientStates
from fedsieve.errors import DataError, UsageError
from fedsieve.params import Layout, Masks, Params

FORMAT = 3
"""of checkpoints; another one is refused"""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the rounds so far have left: with the clients' states of that round, enough to go on as if nothing had happened."""

    round: int
    state: Any
    rows: Sequence[dict[str, Any]]
    link: LinkState
    """what the server remembers of the link"""


class RunFolder:
    """Writes one run. Every file is replaced whole but the growing `records.jsonl`, and the clients' states, a database."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self._identity = path, identity
        self._checkpoint = path / "checkpoint" / "latest.safetensors"
        self.states = ClientStates(path / "checkpoint" / "clients.sqlite")

    @classmethod
    def open(cls, path: Path, identity: str, *, resume: bool) -> RunFolder:
        """Make a new folder, or open one to go on in it.

        Raises:
            UsageError: there is something at that place already, or nothing to go on with.
        """
        if resume and not (path / "config.toml").is_file():
            raise UsageError(f"{path} is no run folder: it holds no config.toml. Start a run with `fedsieve run`.")
        if not resume and path.exists() and (not path.is_dir() or any(path.glob("[!.]*"))):
            raise UsageError(
                f"{path} exists: a run folder is never overwritten.\n"
                f"Go on with `fedsieve resume {path}`, or give another --out."
            )
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, identity)

    def describe(self, config: Mapping[str, Any], partition: Mapping[str, Any]) -> None:
        """Write what is known before round 1."""
        files.replace(self.path / "config.toml", tomli_w.dumps(config))
        files.replace(self.path / "partition.json", json.dumps(partition))

    def restore(self, layout: Layout, module: str) -> Progress | None:
        """Return the last checkpoint, or None before the first one; what came after it is dropped from records and states.

        Raises:
            UsageError: the checkpoint belongs to another config, model or data.
            DataError: the checkpoint, or the states that it needs, cannot be read.
        """
        progress, standing = None, (0, 0)
        if self._checkpoint.exists():
            try:
                saved = thaw(self._checkpoint.read_bytes(), layout, module)
                if (written := saved.get("format", 1)) != FORMAT:
                    raise ValueError(f"its format is {written}, this version of fedsieve reads {FORMAT}")
                if saved["identity"] == self._identity:
                    linked = thaw(saved["link"], layout, LinkState.__module__)
                    progress = Progress(**thaw(saved["progress"], layout, module), link=linked)
                    standing = saved["clients"]
            except Exception as error:
                raise DataError(f"{self._checkpoint} cannot be read: {error}. Start the run anew in another folder.") from None
            if progress is None:
                raise UsageError(
                    f"{self._checkpoint} belongs to another config, model or data than {self.path / 'config.toml'}.\n"
                    "Put the config back as it was, or start a new run in another folder."
                )
        self.states.restore(progress.round if progress else 0, standing)
        rows = progress.rows if progress else []
        files.replace(self.path / "records.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return progress

    def record(self, row: Mapping[str, Any]) -> None:
        """Append the row of a round."""
        with open(self.path / "records.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, progress: Progress) -> None:
        """Replace the checkpoint, once the clients' states that it means are on disk."""
        content = freeze({name: getattr(progress, name) for name in ("round", "state", "rows")})
        self._checkpoint.parent.mkdir(exist_ok=True)
        clients = self.states.commit(progress.round)
        checkpoint = {"format": FORMAT, "identity": self._identity, "clients": clients, "progress": content}
        checkpoint["link"] = freeze(progress.link)
        files.replace(self._checkpoint, freeze(checkpoint))
        self.states.saved(progress.round)

    def finish(self, params: Params, masks: Masks, summary: Mapping[str, Any]) -> None:
        """Write the end result."""
        metadata = {"fingerprint": params.layout.fingerprint.hex(), "density": str(masks.density)}
        model = files.safetensors({name: params[name].clone() for name in params}, metadata)
        files.replace(self.path / "model.safetensors", model)
        files.replace(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


def identity(config: Mapping[str, Any], data: Federation | None = None, start: Params | None = None) -> str:
    """Return a hash of all that decides the results of a run: settings, data and start. How it is run does not count."""
    sections = {name: dict(section) for name, section in config.items()}
    for key in ("workers", "checkpoint_every"):
        sections["engine"].pop(key, None)
    sections["data"].pop("root", None)
    digest = xxhash.xxh3_128(json.dumps(sections, sort_keys=True, default=str).encode())
    if data is not None:
        tensors = (data.train.x, data.train.y, data.test.x, data.test.y)
        arrays = [tensor.numpy() for tensor in tensors] + [Parts.of(data.parts).flat, Parts.of(data.shares).flat]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
    if start is not None:
        digest.update(start.layout.fingerprint)
        digest.update(start.flat.numpy().data)
    return digest.hexdigest()


def fresh(name: str, parent: Path = Path("runs")) -> Path:
    """Return a folder that does not exist yet: runs/NAME-DATE-TIME, with a number if that is taken."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    numbered = (parent / (stem + (f"-{n}" if n > 1 else "")) for n in range(1, 1000))
    return next(path for path in numbered if not path.exists())


def environment() -> dict[str, Any]:
    """Return software, hardware and command, for the summary."""
    packages = ("fedsieve", "torch", "numpy", "constriction", "safetensors")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "git": _git(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git() -> str | None:
    """Commit of the folder the run was started in, with a + if files differ from it; None outside a repository."""
    try:
        commit, changed = (
            subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=True).stdout.strip()  # noqa: S603, S607
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit
