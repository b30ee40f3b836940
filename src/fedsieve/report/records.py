"""Run folders: read one, say what it came to, say how several differ.

    config.toml      resolved settings
    records.jsonl    one JSON object a round, or records.csv, the same as a table (fedsieve.report.table.csv)
    summary.json     totals, once the run has ended
    partition.json   how the labels are shared out among the clients

Megabytes are 10**6 bytes. Importing this loads neither numpy nor matplotlib.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from csv import DictReader
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedsieve.errors import DataError, UsageError

SEED = "engine.seed"
DENSITY = "algorithm.density"
MOST_NAMED = 3
RATES = ("local.lr", "algorithm.lr", "algorithm.server.lr")
_RECORDS = ("records.jsonl", "records.csv")
_OWN = ("algorithm.variant", DENSITY)
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


@dataclass(frozen=True, slots=True)
class Curve:
    """The evaluated rounds of a run: accuracy in percent, and what had been spent by then, evaluation not counted in it."""

    rounds: list[float]
    megabytes: list[float]
    """up and down"""
    seconds: list[float]
    accuracy: list[float]


def find(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders among these and at any depth in them, each once, those of one folder in alphabetical order.

    A folder whose run has no record yet is passed over, unless it is named itself.

    Raises:
        UsageError: one is no run folder and holds none.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        below = list(_below(folder))
        if not below:
            raise _no_run(folder, ", and no folder in it is one")
        for each in below:
            found.setdefault(each.resolve(), each)
    return list(found.values())


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, names_of_files in os.walk(folder):
        folders.sort()
        if "config.toml" in names_of_files and not {*_RECORDS}.isdisjoint(names_of_files):
            folders.clear()
            yield Path(place)


def _no_run(folder: Path, inside: str = "") -> UsageError:
    names_of_files = os.listdir(folder) if folder.is_dir() else []
    missing = ["config.toml"] * ("config.toml" not in names_of_files)
    missing += ["records.jsonl (or records.csv)"] * {*_RECORDS}.isdisjoint(names_of_files)
    what = f"it has no {' and no '.join(missing)}{inside}" if folder.is_dir() else "there is no such folder"
    return UsageError(
        f"{folder} is not a run folder: {what}.\n"
        "A run folder is what `fedsieve run` makes: config.toml, and records.jsonl from the first round on."
    )


def read(folder: Path) -> Run:
    """Read a run folder, also one whose run is still going on or was killed.

    A last line of records.jsonl that is no whole record is dropped: the run was writing it.

    Raises:
        UsageError: `folder` is no run folder.
        DataError: one of its files is damaged.
    """
    folder = Path(folder)
    config = folder / "config.toml"
    records = next((folder / name for name in _RECORDS if (folder / name).is_file()), None)
    if records is None or not config.is_file():
        raise _no_run(folder)
    try:
        settings = tomllib.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{config} cannot be read as TOML: {error}") from error
    return Run(
        folder=folder,
        config=settings,
        rows=rounds(records),
        summary=_object(folder / "summary.json") or {},
        partition=_object(folder / "partition.json"),
    )


def rounds(path: Path) -> list[dict[str, Any]]:
    """Return the records of a records.jsonl or records.csv, one a round.

    The two give the same, but that a table cannot tell null from what is not there at all (null, here), nor where one event
    ends whose text has a semicolon.

    Raises:
        DataError: the file is damaged.
    """
    return _table(path) if path.suffix == ".csv" else _lines(path)


def _lines(path: Path) -> list[dict[str, Any]]:
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


def _table(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        table = DictReader(file)
        rows: list[dict[str, Any]] = []
        for cells in table:
            try:
                rows.append(_record(cells))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {table.line_num} is not a record: {error}. Write the file again.") from error
    return rows


def _record(cells: dict[Any, Any]) -> dict[str, Any]:
    """Return a line of a table as the record it was made of."""
    if None in cells:
        raise ValueError("more cells than the head has")
    row: dict[str, Any] = {}
    for column, cell in cells.items():
        key, *inner = column.split(".", 1)
        if key == "lost":
            row[key] = dict(each.split(": ", 1) for each in re.split(r"; (?=\d+: )", cell) if each)
        elif key == "events":
            row[key] = cell.split("; ") if cell else []
        elif not inner or not cell:
            row.setdefault(key, _value(cell))
        else:
            row[key] = row.get(key) or {}
            place, *way = inner[0].rsplit(".", 1) if key == "phases" else inner
            (row[key].setdefault(place, {}) if way else row[key])[way[0] if way else place] = _value(cell)
    if not isinstance(row.get("round"), int):
        raise ValueError("no round number")
    return row


def _value(cell: str) -> Any:
    return None if not cell else int(cell) if re.fullmatch(r"-?\d+", cell) else float(cell)


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


def groups(runs: Sequence[Run], but: Sequence[str] = (SEED,)) -> list[list[Run]]:
    """Put together the runs that differ only in these settings, by default the seed; order of first appearance."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        config = {key: value for key, value in flat(run.config).items() if key not in but}
        together.setdefault(json.dumps(config, sort_keys=True, default=str), []).append(run)
    return list(together.values())


def names(runs: Sequence[Run], *, seed: bool = True) -> list[str]:
    """Return a short name for each run that says in what it differs from the others.

    Settings of an algorithm are named where they differ between runs of that algorithm; all others, but the number of
    rounds, where they differ between any two runs. Runs that are alike in all of it are told apart by their folder.
    """
    shared = [key for key in differences(runs) if not key.startswith("algorithm.") and key not in (SEED, "engine.rounds")]
    methods = [run.method for run in runs]
    own = {
        method: differences([run for run, each in zip(runs, methods, strict=True) if each == method])
        for method in dict.fromkeys(methods)
    }
    found = []
    for run, method in zip(runs, methods, strict=True):
        keys = [*_OWN, *(key for key in own[method] if key.startswith("algorithm.")), *shared, *([SEED] if seed else [])]
        found.append(_name(run, keys))
    return _apart(found, runs)


def short_names(runs: Sequence[Run]) -> list[str]:
    """Return short names that tell runs apart without seed and density: the method, and what it takes besides.

    Data and model are named at all runs where they differ, other settings where a method is there with several of them; where
    it takes more than MOST_NAMED to tell its runs apart, each run has those in which it is not like most.
    """
    different = [key for key in differences(runs) if key not in (SEED, DENSITY, "algorithm.name")]
    world = [key for key in different if key.startswith(("data.", "model."))]
    own = [key for key in different if key not in world]
    own.sort(key=lambda key: (key not in _OWN, key in RATES, not key.startswith("algorithm."), key == "engine.rounds"))
    shared = _telling(runs, world)
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(_name(run, shared, bare=True), []).append(run)
    chosen: dict[int, list[str]] = {}
    for set_ in alike.values():
        keys = _telling(set_, own)
        usual = {key: Counter(str(flat(run.config).get(key)) for run in set_).most_common(1)[0][0] for key in keys}
        for run in set_:
            unlike = [key for key in keys if len(keys) <= MOST_NAMED or str(flat(run.config).get(key)) != usual[key]]
            chosen[id(run)] = [*unlike, *shared]
    found = [_name(run, chosen[id(run)], bare=True) for run in runs]
    clear = [_name(run, chosen[id(run)], bare=found.count(name) == 1) for run, name in zip(runs, found, strict=True)]
    return _apart(clear, runs)


def _telling(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Return those of the keys, in order, that tell runs apart which the keys before do not."""
    kept: list[str] = []
    configs = [flat(run.config) for run in runs]
    for key in keys:
        if len({str([c.get(k) for k in (*kept, key)]) for c in configs}) > len(
            {str([c.get(k) for k in kept]) for c in configs}
        ):
            kept.append(key)
    return kept


def _apart(found: Sequence[str], runs: Sequence[Run]) -> list[str]:
    return [name if found.count(name) == 1 else f"{name} ({run.folder.name})" for name, run in zip(found, runs, strict=True)]


def _name(run: Run, keys: Sequence[str], *, bare: bool = False) -> str:
    """Return the method and these settings; with `bare`, words among them without their key, and not the method's own again."""
    config = flat(run.config)
    parts = [run.method]
    for key in dict.fromkeys(keys):
        value, word = config.get(key), key.rpartition(".")[2]
        if value is None or key == "algorithm.name" or (bare and value == run.method):
            continue
        text = show(value)
        text = text if len(text) <= 24 else f"{text[:11]}…{text[-12:]}"
        parts.append(text if word in ("name", "variant") or (bare and isinstance(value, str)) else f"{word} {text}")
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


def curve(rows: Sequence[dict[str, Any]]) -> Curve:
    """Return the evaluated rounds of a run's records."""
    carried = accumulate((row.get("bytes_up", 0) + row.get("bytes_down", 0)) / 1e6 for row in rows)
    spent = accumulate(number(row.get("seconds")) or 0.0 for row in rows)
    points = [
        (float(row["round"]), megabytes, seconds, 100 * value)
        for row, megabytes, seconds in zip(rows, carried, spent, strict=True)
        if (value := number(row.get("accuracy"))) is not None
    ]
    return Curve(*(list(column) for column in zip(*points, strict=True))) if points else Curve([], [], [], [])
