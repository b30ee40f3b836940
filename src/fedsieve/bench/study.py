"""What studies share: runs that are played once and kept as small files, and means over their seeds."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsieve import files
from fedsieve.config import Config
from fedsieve.engine.loop import Result
from fedsieve.report import records
from fedsieve.report.table import csv

Summary = dict[str, Any]


def play(
    config: Config, folder: Path, place: Path, also: Callable[[Result], Mapping[str, str]] = lambda result: {}
) -> Summary | None:
    """Run a config, or go on with it, and keep its config.toml, summary.json and records.csv in folder / place.

    `also` makes further files of the result, name -> text, before the run folder is gone.

    Returns:
        The summary; None if the run is there already.
    """
    kept = folder / place
    if (kept / "summary.json").is_file():
        return None
    out = Path("runs") / "studies" / folder.name / place
    result = config.run(out, resume=(out / "config.toml").is_file())
    kept.mkdir(parents=True, exist_ok=True)
    for name, text in also(result).items():
        files.replace(kept / name, text)
    files.replace(kept / "records.csv", csv(records.read(out)))
    shutil.copy(out / "config.toml", kept)
    shutil.copy(out / "summary.json", kept)
    shutil.rmtree(out)
    return dict(result.summary)


def summaries(place: Path) -> list[Summary]:
    """Return the summaries of all seeds that were played."""
    return [json.loads(path.read_text()) for path in sorted(place.glob("seed*/summary.json"))]


def mean(found: Sequence[Summary], *keys: str) -> float:
    """Return the mean over the seeds of the sum of some entries; 0 if there are none."""
    return statistics.fmean(sum(run[key] for key in keys) for run in found) if found else 0.0


def curve(path: Path) -> NDArray[np.float64]:
    """Read a records.csv: megabytes carried so far, seconds so far, test accuracy in percent; shape (3, evaluations)."""
    found = records.curve(records.rounds(path))
    return np.array([found.megabytes, found.seconds, found.accuracy])
