"""Tables of runs: on the terminal, in Markdown, and the records of one run as CSV."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from csv import writer
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedsieve.report.records import Outcome, Run, flat, groups, names, outcome

_NUMBERS: dict[str, tuple[Callable[[Outcome], float | None], str]] = {
    "rounds": (lambda o: o.rounds, "count"),
    "accuracy %": (lambda o: None if o.accuracy is None else 100 * o.accuracy, "percent"),
    "best %": (lambda o: None if o.best is None else 100 * o.best, "percent"),
    "client p10 %": (lambda o: None if o.p10 is None else 100 * o.p10, "percent"),
    "density": (lambda o: o.density, "share"),
    "MB up": (lambda o: o.bytes_up / 1e6, "amount"),
    "MB down": (lambda o: o.bytes_down / 1e6, "amount"),
    "seconds": (lambda o: o.seconds, "amount"),
}


def rows(runs: Sequence[Run], *, each: bool = True) -> list[dict[str, str]]:
    """Return the cells of the summary table, one dictionary of column to text a row.

    Runs that differ only in their seed get a row of their mean and sample standard deviation: after the rows of the
    runs, or in their place with `each` false. A column that no run can fill is left out.
    """
    found: list[dict[str, str]] = []
    together = groups(runs)
    titles = dict(zip(map(id, runs), names(runs), strict=True))
    for group, title in zip(together, names([group[0] for group in together], seed=False), strict=True):
        if each or len(group) == 1:
            found += [_row(titles[id(run)], [run], str(run.folder)) for run in group]
        if len(group) > 1:
            found.append(_row(f"{title}: mean ± sd ({size(group)})", group, ""))
    empty = {column for column in _NUMBERS if all(row[column] == "–" for row in found)} - {"accuracy %"}
    return [{column: cell for column, cell in row.items() if column not in empty} for row in found]


def size(group: Sequence[Run]) -> str:
    """Return "n seeds" for runs that differ only in their seed, "n runs" where seeds repeat."""
    seeds = {flat(run.config).get("engine.seed") for run in group}
    return f"{len(group)} {'seeds' if len(seeds) == len(group) else 'runs'}"


def _row(title: str, group: Sequence[Run], folder: str) -> dict[str, str]:
    outcomes = [outcome(run) for run in group]
    cells = {"method": title}
    for column, (value, kind) in _NUMBERS.items():
        known = [number for number in map(value, outcomes) if number is not None]
        cells[column] = _measure(known, kind) if known else "–"
    return cells | {"folder": folder}


def _measure(values: Sequence[float], kind: str) -> str:
    centre = mean(values)
    text = digits(centre, kind)
    if all(value == values[0] for value in values):
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {stdev(values):.{decimals}f}"


def digits(value: float, kind: str = "amount") -> str:
    """Return a number with the digits its kind deserves: count, percent (one decimal), share and amount (three figures)."""
    if kind == "count":
        return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"
    if kind == "percent":
        return f"{value:.1f}"
    if value == 0 or kind == "share":
        return f"{value:.3g}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    for bound, decimals in ((0.01, 5), (0.1, 4), (1, 3), (10, 2), (100, 1)):
        if abs(value) < bound:
            return f"{value:.{decimals}f}"
    return f"{value:,.0f}"


def summary_table(runs: Sequence[Run]) -> Table:
    """Return the summary: for one run a key and a value a line, for several one line a run.

    Accuracy is in percent, MB = 10**6 bytes without the eval phase. Made for a terminal of 80 columns: the folder
    stands under the name of its run, and a deviation under its mean.
    """
    found = rows(runs)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=len(runs) > 1, show_edge=False)
    if len(runs) == 1:
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in _single(runs[0], found[0]).items():
            table.add_row(Text(key), Text(printable(value)))
        return table
    shown = [column for column in found[0] if column != "folder"] if found else ["method"]
    for column in shown:
        table.add_column(
            column.replace(" ", "\n"), justify="left" if column == "method" else "right", no_wrap=column != "method"
        )
    for row in found:
        first = Text(printable(row["method"]), overflow="fold").append(f"\n{printable(row['folder'])}".rstrip(), style="dim")
        cells = [Text(row[column].replace(" ± ", "\n± ")) for column in shown[1:]]
        table.add_row(first, *cells, style="" if row["folder"] else "bold")
    return table


def _single(run: Run, cells: dict[str, str]) -> dict[str, str]:
    status = outcome(run).status
    return {"method": cells["method"], **({} if status == "done" else {"status": status})} | cells


def summary_markdown(runs: Sequence[Run]) -> str:
    """Return the summary as a Markdown table, laid out as on the terminal."""
    found = rows(runs)
    if len(runs) == 1:
        cells = _single(runs[0], found[0])
        return markdown(["", ""], list(cells.items()), right=False)
    return markdown(list(found[0]), [list(row.values()) for row in found]) if found else ""


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], *, right: bool = True) -> str:
    """Return a Markdown table; all columns but the first and a last one named folder are aligned to the right."""
    ruler = ["---:" if right and i and name != "folder" else "---" for i, name in enumerate(head)]
    lines = [head, ruler, *([_cell(text) for text in row] for row in body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    for character in "\\|`*_<>[]":
        text = text.replace(character, f"\\{character}")
    return printable(text)


def printable(text: str) -> str:
    """Return text on one line and without control characters, which could end a table row or steer a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def csv(run: Run) -> str:
    """Return the records as CSV: one line a round, nested keys joined with dots, nulls empty.

    `lost` is one column (`id: reason`, separated by semicolons), so that the columns do not depend on who was lost, and so
    is `events`.
    """
    records = [_record(row) for row in run.rows]
    columns = dict.fromkeys(key for record in records for key in record)
    nested = {key.partition(".")[0] for key in columns if "." in key}
    kept = [key for key in columns if key not in nested]
    text = io.StringIO()
    if kept:
        lines = writer(text, lineterminator="\n")
        lines.writerow(kept)
        lines.writerows([record.get(key) for key in kept] for record in records)
    return text.getvalue()


def _record(row: dict[str, Any]) -> dict[str, Any]:
    lost = "; ".join(f"{client}: {reason}" for client, reason in (row.get("lost") or {}).items())
    texts = {"lost": lost, "events": "; ".join(row.get("events") or ())}
    return flat(row | {key: text for key, text in texts.items() if key in row})
