"""What a run says while it goes: one live line on a terminal, one plain line a round elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from fedsieve.report.records import read


class Watch:
    """Shows the row of each round. Use as a context manager, and as `fit`'s `watch`.

    Args:
        rounds: of the run.
        folder: its run folder.
        before: what each line begins with.
    """

    def __init__(self, rounds: int, folder: Path, before: str = "") -> None:
        self.console = Console(soft_wrap=not sys.stdout.isatty())
        self._rounds, self._folder, self._before = rounds, folder, f"{before}  " if before else ""
        self._up = self._down = 0
        self._accuracy = "  -   "
        self._bar = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            said = TextColumn("{task.fields[said]}", table_column=Column())  # wraps where the terminal is narrow
            bar = () if before else (BarColumn(6),)  # both do not fit into 80 columns
            columns = (TextColumn(f"{self._before}round"), MofNCompleteColumn(), *bar, TimeRemainingColumn(compact=True), said)
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=rounds, said="")

    def __enter__(self) -> Watch:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the live line as it is."""
        if self._bar:
            self._bar.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show a round."""
        if not self._up + self._down:  # a resumed run has earlier rounds in its folder
            earlier = [each for each in read(self._folder).rows if each["round"] < row["round"]]
            self._up, self._down = (sum(each[key] for each in earlier) for key in ("bytes_up", "bytes_down"))
        self._up += row["bytes_up"]
        self._down += row["bytes_down"]
        if row["accuracy"] is not None:
            self._accuracy = f"{row['accuracy']:6.2%}"
        lost = f"  lost {len(row['lost'])}" if row["lost"] else ""
        said = f"acc {self._accuracy} density {row['density']:.3f} up {megabytes(self._up)} down {megabytes(self._down)}{lost}"
        if self._bar:
            self._bar.update(self._task, completed=row["round"], said=said)
        else:
            print(f"{self._before}round {row['round']}/{self._rounds}  {said}  {row['seconds']:.2f} s", flush=True)


class Bar:
    """Shows how far long work has come: a bar on a terminal, nothing elsewhere; on the error stream. A context manager."""

    def __init__(self, what: str, total: int) -> None:
        columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn(compact=True))
        console = Console(stderr=True)
        shown = bool(total) and console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(*columns, console=console, transient=True) if shown else None
        if self._bar:
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Bar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def tick(self) -> None:
        """One more is done."""
        if self._bar:
            self._bar.advance(self._task)


def megabytes(nbytes: int) -> str:
    """Return a number of bytes in megabytes of 10**6."""
    return f"{nbytes / 1e6:.2f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"
