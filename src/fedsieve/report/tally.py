"""Runs that differ in their seed alone taken together: means with an interval, and which of several is best.

The interval is that of Student's t over the seeds: the mean, plus and minus a quantile times the standard error. It says how
sure the mean is, if seeds are drawn at random; it is no spread of single runs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from csv import writer
from dataclasses import dataclass
from math import cos, pi, sin, sqrt, tan
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedsieve.errors import UsageError
from fedsieve.report.records import Run, number, outcome
from fedsieve.report.table import digits, markdown, printable
from fedsieve.settings import nearest

_SPREAD = ("mean", "std", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "worst10")
TRAINING = ("train_loss", "density", "bytes_up", "bytes_down", "bytes_down_once", "flops", "seconds")
"""keys to choose by that look at no test example; the least is best"""
TEST = ("accuracy", "best_accuracy", "loss", *(f"{part}_accuracy.{key}" for part in ("client", "tuned") for key in _SPREAD))
"""keys measured on test examples, or on those that data.validation holds out"""
_SUMS = ("bytes_up", "bytes_down", "bytes_down_once", "flops", "seconds")


@dataclass(frozen=True)
class Tally:
    """The runs of one setting."""

    title: str
    setting: Mapping[str, Any]
    """what distinguishes it, by dotted keys"""
    runs: Sequence[Run]
    """those that are complete"""
    diverged: int = 0
    """those that are not, because a loss was not finite"""

    def mean(self, column: str) -> float | None:
        """Return the mean of a column over the runs; None if no run has it."""
        values = self._values(column)
        return mean(values) if values else None

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % interval of the mean accuracy; None for less than two runs."""
        values = self._values("accuracy")
        return half_width(values) if len(values) > 1 else None

    def _values(self, column: str) -> list[float]:
        found = (getattr(outcome(run), column) for run in self.runs)
        return [float(value) for value in found if value is not None]


def half_width(values: Sequence[float], level: float = 0.95) -> float:
    """Return half the width of the interval of a mean, by Student's t; of two values or more."""
    return quantile(len(values) - 1, level) * stdev(values) / sqrt(len(values))


def quantile(freedom: int, level: float = 0.95) -> float:
    """Return t with P(|T| <= t) = level, for Student's T with so many degrees of freedom, >= 1."""
    low, high = 0.0, pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _central(angle, freedom) < level else (low, angle)
    return sqrt(freedom) * tan(low)


def _central(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)): the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cos(angle) ** 2
        total += term
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


# ---- tables


def table(tallies: Sequence[Tally]) -> Table:
    """Return the table for a terminal of 80 columns."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    head, *body = _cells(tallies)
    for place, heading in enumerate(head):
        shown.add_column(heading.replace(" ", "\n", 1), justify="right" if place else "left", no_wrap=bool(place))
    for title, *cells in body:
        shown.add_row(Text(printable(title), overflow="fold"), *map(Text, cells))
    return shown


def table_markdown(tallies: Sequence[Tally]) -> str:
    """Return the same as Markdown."""
    head, *body = _cells(tallies)
    return markdown(head, body)


def _cells(tallies: Sequence[Tally]) -> list[list[str]]:
    rows = [["setting", "runs", "accuracy % ± 95 %", "client p10 %", "MB up", "MB down", "seconds"]]
    for tally in tallies:
        accuracy, p10, up, down, seconds = map(tally.mean, ("accuracy", "p10", "bytes_up", "bytes_down", "seconds"))
        half = tally.interval
        cells = [f"{len(tally.runs)}" + (f" ({tally.diverged} diverged)" if tally.diverged else "")]
        spread = "n/a" if half is None else digits(100 * half, "percent")
        cells.append("–" if accuracy is None else f"{digits(100 * accuracy, 'percent')} ± {spread}")
        cells.append("–" if p10 is None else digits(100 * p10, "percent"))
        cells += ["–" if value is None else digits(value / 1e6) for value in (up, down)]
        rows.append([tally.title, *cells, "–" if seconds is None else digits(seconds)])
    return rows


def csv(tallies: Sequence[Tally]) -> str:
    """Return the table as CSV: shares in [0, 1], bytes, seconds; a column for each key that distinguishes the settings."""
    keys = list(dict.fromkeys(key for tally in tallies for key in tally.setting))
    text = io.StringIO()
    lines = writer(text, lineterminator="\n")
    columns = ("accuracy", "accuracy_low", "accuracy_high", "client_accuracy_p10", "bytes_up", "bytes_down", "seconds")
    lines.writerow([*keys, "runs", "diverged", *columns])
    for tally in tallies:
        accuracy, half = tally.mean("accuracy"), tally.interval
        ends = [None, None] if accuracy is None or half is None else [accuracy - half, accuracy + half]
        means = [tally.mean(column) for column in ("p10", "bytes_up", "bytes_down", "seconds")]
        given = [tally.setting.get(key) for key in keys]
        lines.writerow([*given, len(tally.runs), tally.diverged, accuracy, *ends, *means])
    return text.getvalue()


# ---- choosing


def refuse(key: str, *, by_test: bool) -> None:
    """Raise a UsageError if a choice by this key is none, or is one on test examples.

    Args:
        key: of the records.
        by_test: whether that is asked for, or they are no test examples but held-out ones.
    """
    if key in TRAINING or (by_test and key in TEST):
        return
    if not by_test and key.startswith(("accuracy", "best_accuracy", "client_accuracy", "tuned_accuracy", "loss")):
        raise UsageError(
            f"--pick {key} would choose by test examples, and the test figures of what is chosen are then too good.\n"
            "Hold training examples out in their place (data.validation = 0.2), choose by train_loss, or add --pick-by-test:\n"
            "the choice is then marked as made by test examples."
        )
    allowed = [*TRAINING, *(TEST if by_test else ())]
    raise UsageError(f"--pick {key}: there is no such key to choose by.{nearest(key, allowed)} There are {', '.join(allowed)}.")


def best(tallies: Sequence[Tally], key: str) -> tuple[Tally, float]:
    """Return the setting whose runs have the best mean of a key, and that mean. Settings with a run that diverged are left out.

    Accuracies are best when large, all else (their standard deviations too) when small; of equals the first is taken.

    Raises:
        UsageError: no setting has this key in all its runs.
    """
    found: list[tuple[Tally, float]] = []
    for tally in tallies:
        values = [measure(run, key) for run in tally.runs]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values) and not tally.diverged:
            found.append((tally, mean(known)))
    if not found:
        raise UsageError(f"--pick {key}: no setting has it in all its runs (see docs/records.md for when it is measured).")
    sign = -1 if largest(key) else 1
    return min(found, key=lambda each: sign * each[1])


def largest(key: str) -> bool:
    """Whether the largest value of a key is the best."""
    return "accuracy" in key and not key.endswith(".std")


def measure(run: Run, key: str) -> float | None:
    """Return what a run comes to in a key of its records: a sum for bytes, operations and seconds, else the last value."""
    if key == "best_accuracy":
        return outcome(run).best
    part, _, inner = key.partition(".")
    cells = [row[part] for row in run.rows if row.get(part) is not None]
    values = [value for cell in cells if (value := number(cell[inner] if inner else cell)) is not None]
    if not values:
        return None
    return sum(values) if key in _SUMS else values[-1]
