"""Run folders: read one, say what it came to, say how several differ.

    config.toml      resolved settings
    records.jsonl    one JSON object a round
    summary.json     totals, once the run has ended
    partition.json   how the labels are shared out among the clients

Megabytes are 10**6 bytes. Importing this loads neither numpy nor matplotlib.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsieve.errors import DataError, UsageError

SEED = "engine.seed"
_OWN = ("algorithm.variant", "algorithm.density")
"""settings that a name always carries, where the method has them"""


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder as it was when it was read."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    """one a round, in the order of the file"""
    summary: dict[str, Any]
    """empty as long as the run has not ended"""
    partition: dict[str, Any] | None

    @property
    def method(self) -> str:
        """Name of the algorithm, or of the folder where the settings hold none."""
        return str(flat(self.config).get("algorithm.name") or self.summary.get("algorithm") or self.folder.resolve().name)

    @property
    def label(self) -> str:
        """Method, its variant and density where it has them, and the seed."""
        return _name(self, (*_OWN, SEED))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. Accuracies are in [0, 1], None where nothing was evaluated."""

    status: str
    """done, interrupted, diverged; unfinished where the run wrote no summary"""
    rounds: int
    """rounds that were completed"""
    accuracy: float | None
    best: float | None
    p10: float | None
    """10th percentile over the clients, of their own test accuracy at the last evaluation"""
    density: float | None
    bytes_up: int
    """all phases but eval"""
    bytes_down: int
    seconds: float


def read(folder: Path) -> Run:
    """Read a run folder, also one whose run is still going on or was killed.

    A last line of records.jsonl that is no whole record is dropped: the run was writing it.

    Raises:
        UsageError: `folder` is no run folder.
        DataError: one of its files is damaged.
    """
    folder = Path(folder)
    missing = [name for name in ("config.toml", "records.jsonl") if not (folder / name).is_file()]
    if missing:
        what = f"it has no {' and no '.join(missing)}" if folder.is_dir() else "there is no such folder"
        raise UsageError(
            f"{folder} is not a run folder: {what}.\n"
            "A run folder is what `fedsieve run` makes: config.toml, and records.jsonl from the first round on."
        )
    config = folder / "config.toml"
    try:
        settings = tomllib.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{config} cannot be read as TOML: {error}") from error
    return Run(
        folder=folder,
        config=settings,
        rows=_rows(folder / "records.jsonl"),
        summary=_object(folder / "summary.json") or {},
        partition=_object(folder / "partition.json"),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("round"), int):
                raise ValueError("not an object with a round number")
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number} is not a record: {error}.\n"
                "Each line but the last must be one whole JSON object; repair or remove that line to read the rest."
            ) from error
        rows.append(row)
    return rows


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}. Remove it to go on without it.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, not an object. Remove it to go on without it.")
    return value


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries under dotted keys, in order."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the dotted config keys whose values differ, each with its value in each run (None where a run lacks it)."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row[1:])}


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Put together the runs that differ only in their seed; order of first appearance."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        config = {key: value for key, value in flat(run.config).items() if key != SEED}
        together.setdefault(json.dumps(config, sort_keys=True, default=str), []).append(run)
    return list(together.values())


def names(runs: Sequence[Run], *, seed: bool = True) -> list[str]:
    """Return a short name for each run that says in what it differs from the others.

    Settings of an algorithm are named where they differ between runs of that algorithm; all others, but the number of
    rounds, where they differ between any two runs. Runs that are alike in all of it are told apart by their folder.
    """
    shared = [key for key in differences(runs) if not key.startswith("algorithm.") and key not in (SEED, "engine.rounds")]
    found = []
    for run in runs:
        own = differences([other for other in runs if other.method == run.method])
        keys = [*_OWN, *(key for key in own if key.startswith("algorithm.")), *shared, *([SEED] if seed else [])]
        found.append(_name(run, keys))
    return [name if found.count(name) == 1 else f"{name} ({run.folder.name})" for name, run in zip(found, runs, strict=True)]


def _name(run: Run, keys: Sequence[str]) -> str:
    config = flat(run.config)
    parts = [run.method]
    for key in dict.fromkeys(keys):
        value, word = config.get(key), key.rpartition(".")[2]
        if value is None or key == "algorithm.name":
            continue
        text = show(value)
        text = text if len(text) <= 24 else f"{text[:11]}…{text[-12:]}"
        parts.append(text if word in ("name", "variant") else f"{word} {text}")
    return ", ".join(parts)


def show(value: Any) -> str:
    """Return a setting as text: lists without brackets, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(show(item) for item in value) or "none"
    return str(value)


def number(value: Any) -> float | None:
    """Return a finite number as float, and None for anything else (a null, a NaN of a run that diverged)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def outcome(run: Run) -> Outcome:
    """Return what the run came to: its summary where there is one, else what its records add up to."""
    accuracies = [value for row in run.rows if (value := number(row.get("accuracy"))) is not None]
    clients = [row["client_accuracy"] for row in run.rows if row.get("client_accuracy")]
    last = run.rows[-1] if run.rows else {}
    found = {
        "accuracy": accuracies[-1] if accuracies else None,
        "best_accuracy": max(accuracies, default=None),
        "density": last.get("density"),
        "bytes_up": sum(row.get("bytes_up", 0) for row in run.rows),
        "bytes_down": sum(row.get("bytes_down", 0) for row in run.rows),
        "seconds": sum(number(row.get("seconds")) or 0.0 for row in run.rows),
    } | {key: value for key, value in run.summary.items() if value is not None}
    return Outcome(
        status=str(found.get("status", "unfinished")),
        rounds=last.get("round", 0),
        accuracy=number(found["accuracy"]),
        best=number(found["best_accuracy"]),
        p10=number(clients[-1].get("p10")) if clients else None,
        density=number(found["density"]),
        bytes_up=int(found["bytes_up"]),
        bytes_down=int(found["bytes_down"]),
        seconds=float(found["seconds"]),
    )
