"""Figures of the benches over time: results/bench.jsonl, one line a bench and run; `make bench-check` looks for falls.

Every figure is a ratio of two measurements of one run, and more is better, so that figures of different days can be compared.
Only lines of one kind of machine are.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedsieve.engine.folder import environment

HISTORY = Path("results/bench.jsonl")
FALL = 0.2
"""share of its usual value by which a figure may fall"""


def add(bench: str, figures: Mapping[str, float], history: Path = HISTORY) -> None:
    """Append a run's figures."""
    known = environment()
    machine = f"{known['hardware']['processor']}, {known['hardware']['cores']} cores"
    line = {"bench": bench, "figures": dict(figures), "machine": machine, "commit": known["git"], "ended": known["ended"]}
    history.parent.mkdir(parents=True, exist_ok=True)
    with open(history, "a") as file:
        file.write(json.dumps(line) + "\n")


def falls(history: Path = HISTORY) -> Iterator[str]:
    """Yield a sentence for each figure whose last value is far below the median of those before it."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for text in history.read_text().splitlines():
        line = json.loads(text)
        for name, value in line["figures"].items():
            values[line["machine"], line["bench"], name].append(value)
    for (machine, bench, name), (*before, last) in values.items():
        usual = statistics.median(before) if before else last
        if last < (1 - FALL) * usual:
            yield f"{bench}: {name} fell from {usual:.3g} to {last:.3g} ({last / usual - 1:.0%}) on {machine}"


def main() -> int:
    """Print what fell; exit 1 if something did."""
    if not HISTORY.is_file():
        print(f"{HISTORY} is not there: `make bench` writes it")
        return 1
    fallen = list(falls())
    print("\n".join(fallen) or f"no figure of {HISTORY} fell by more than {FALL:.0%}")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
