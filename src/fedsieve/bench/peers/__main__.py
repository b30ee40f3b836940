"""fedsieve against other simulators on J1, J2 and J3 of `fedsieve.bench.rounds`: `make bench-peers`.

Each peer runs in an environment of its own, kept in .peers/, set up as its documentation recommends (see its driver). All are
handed the same images, partition, batch size, learning rate and rounds; the cohorts too, but to Flower, which draws its own.
Runs take turns, fedsieve first, as often as `--repetitions` says; figures are medians. fedsieve-bf16 is fedsieve once more,
with local.precision = bf16.

    rounds/s    of the rounds after the first five, evaluation every five rounds included
    start-up    seconds from the start of the process to the end of round 1, less a mean round
    memory      most that all processes of the peer held together, shared pages counted once, looked at twice a second
    ratio       fedsieve's rounds/s over those of the fastest peer

The load of the machine before each run is kept with its figures. A run begins under what the one before it leaves of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsieve import files
from fedsieve.bench import history
from fedsieve.bench.peers import job
from fedsieve.bench.peers.environments import DRIVERS, prepare
from fedsieve.bench.peers.tree import Tree
from fedsieve.bench.rounds import EVERY, TASKS, Task
from fedsieve.data.batches import federate
from fedsieve.data.datasets import load
from fedsieve.engine.folder import environment
from fedsieve.errors import FedsieveError, Interrupted, UsageError
from fedsieve.report.table import markdown
from fedsieve.settings import Data
from fedsieve.streams import Streams

OURS = "fedsieve"
BUSY = 0.5
"""load of the machine above which figures are no good"""
Row = dict[str, Any]
"""what one run was measured to do, or its error"""


@dataclass(frozen=True, slots=True)
class Peer:
    """How a simulator is started."""

    name: str
    launcher: tuple[str, ...] = ()
    """arguments of Python before the driver"""
    words: tuple[str, ...] = ()
    """arguments of the driver after those that all take"""
    threads: int | None = None
    """OMP_NUM_THREADS; None: not set, so that each library takes what it takes by itself"""

    @property
    def package(self) -> str:
        """Name of the environment and of the driver."""
        return self.name.partition("-")[0]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
PEERS = (
    Peer("flower"),
    Peer("pfl", TORCHRUN),
    Peer("fluke"),
    Peer("pfl-1process"),
    Peer("fluke-1thread", threads=1),
    Peer("fedsieve-bf16", words=("bf16",)),
)
USUAL = ("flower", "pfl", "fluke", "fedsieve-bf16")


def run(peer: Peer, python: Path, task: Path, scratch: Path, limit: float) -> Row:
    """Play a job once in a process of its own; return its figures. Nothing that it started is left when this returns.

    Args:
        peer: what to start.
        python: the Python to start it with.
        task: the job, as `job.write` wrote it.
        scratch: an empty folder for it to work in.
        limit: seconds that it may take.

    Raises:
        FedsieveError: it failed, or took too long; the message ends with its last words.
    """
    record, log = scratch / "record.json", scratch / "log.txt"
    words = [str(python), *peer.launcher, str(DRIVERS / f"drive_{peer.package}.py"), str(task), str(record), *peer.words]
    with open(log, "wb") as said, Tree() as tree:
        began = time.monotonic()
        streams = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
        process = tree.start(words, cwd=scratch, env=_variables(peer, scratch), **streams)
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"none after {limit:.0f} s"
    if code or not record.is_file():
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise FedsieveError(f"exit code {code}: {' / '.join(last)[-500:]}")
    return figures(json.loads(record.read_text()), began) | {"peak_bytes": tree.peak}


def figures(record: Mapping[str, Any], began: float) -> Row:
    """Compute the figures of a run from the times at which its rounds ended and the time at which its process began."""
    ends = record["ends"]
    seconds = (ends[-1] - ends[EVERY - 1]) / (len(ends) - EVERY)
    return {
        "rounds_per_second": 1 / seconds,
        "startup_seconds": ends[0] - began - seconds,
        "accuracy": record["accuracy"][str(len(ends))],
        "accuracies": record["accuracy"],
        "seconds": [end - begin for begin, end in zip([began, *ends], ends, strict=False)],
        **{key: record[key] for key in ("version", "torch", "setting")},
    }


def _variables(peer: Peer, scratch: Path) -> dict[str, str]:
    """Environment variables of a run: nothing reported home, nothing left in the user's folders."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if peer.package != OURS:
        kept.pop("PYTHONPATH", None)
    if peer.threads:
        kept["OMP_NUM_THREADS"] = str(peer.threads)
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | quiet | {"FLWR_HOME": str(scratch / "flwr"), "RAY_TMPDIR": str(scratch)}


def medians(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """Return the median figures by job and peer, of the runs that came to their end."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            runs.setdefault((row["job"], row["peer"]), []).append(row)
    names = ("rounds_per_second", "startup_seconds", "peak_bytes", "accuracy")
    return {key: {name: statistics.median(row[name] for row in found) for name in names} for key, found in runs.items()}


def best(middle: Mapping[tuple[str, str], Row]) -> dict[str, str]:
    """Return the fastest peer of each job."""
    speeds: dict[str, dict[str, float]] = {}
    for (name, peer), row in middle.items():
        if not peer.startswith(OURS):
            speeds.setdefault(name, {})[peer] = row["rounds_per_second"]
    return {name: max(found, key=found.__getitem__) for name, found in speeds.items()}


def ratios(middle: Mapping[tuple[str, str], Row]) -> dict[str, float]:
    """Return fedsieve's rounds per second over those of the fastest peer, for each job that both played."""
    return {
        name: middle[name, OURS]["rounds_per_second"] / middle[name, peer]["rounds_per_second"]
        for name, peer in best(middle).items()
        if (name, OURS) in middle
    }


def measure(tasks: Sequence[Task], peers: Sequence[Peer], options: argparse.Namespace) -> list[Row]:
    """Play every job with fedsieve and every peer in turn; a peer that fails is told and left out of that job from then on."""
    rows: list[Row] = []
    if (busy := os.getloadavg()[0]) > BUSY:
        print(f"the machine is busy (load {busy:.1f}): simulators that use two threads lose more by it than others", flush=True)
    pythons, broken = {OURS: Path(sys.executable)}, {}
    for package in dict.fromkeys(peer.package for peer in peers if peer.package != OURS):
        print(f"environment of {package} in {options.folder / package}", flush=True)
        try:
            pythons[package] = prepare(package, options.folder)
        except UsageError as error:
            broken[package] = str(error)
    with tempfile.TemporaryDirectory(prefix="peers-") as place:
        for task in tasks:
            settings = Data(name="fashion-mnist", clients=task.clients)
            path = Path(place) / f"{task.name}.npz"
            job.write(task, federate(load(settings), settings, Streams(0)), EVERY + (options.rounds or task.rounds), path)
            failed: set[str] = set()
            for repetition in range(1, options.repetitions + 1):
                for peer in (Peer(OURS), *peers):
                    if peer.name in failed:
                        continue
                    row: Row = {"job": task.name, "peer": peer.name, "repetition": repetition, "load": os.getloadavg()[0]}
                    scratch = Path(place) / "run"
                    scratch.mkdir()
                    try:
                        if peer.package in broken:
                            raise UsageError(broken[peer.package])
                        row |= run(peer, pythons[peer.package], path, scratch, options.limit)
                    except FedsieveError as error:
                        row["error"] = str(error)
                        failed.add(peer.name)
                    shutil.rmtree(scratch, ignore_errors=True)
                    rows.append(row)
                    print(said(row), flush=True)
            path.unlink()
    return rows


def said(row: Row) -> str:
    """Return a line about a run."""
    head = f"{row['job']} {row['repetition']}  {row['peer']:13}"
    if "error" in row:
        return f"{head}  failed: {row['error']}"
    return (
        f"{head}  {row['rounds_per_second']:.3f} rounds/s  start-up {row['startup_seconds']:.1f} s"
        f"  memory {row['peak_bytes'] / 1e6:.0f} MB  accuracy {row['accuracy']:.3f}"
    )


def table(rows: Sequence[Row]) -> str:
    """Return the medians as a table."""
    middle = medians(rows)
    head = ["job", "simulator", "rounds/s", "fedsieve's over it", "start-up, s", "memory, MB", "accuracy"]
    body = []
    for name, peer in dict.fromkeys((row["job"], row["peer"]) for row in rows):
        found = middle.get((name, peer))
        if not found:
            body.append([name, peer, "failed", "", "", "", ""])
            continue
        ours = middle.get((name, OURS))
        over = f"{ours['rounds_per_second'] / found['rounds_per_second']:.2f}" if ours and peer != OURS else ""
        figures = (f"{found['startup_seconds']:.1f}", f"{found['peak_bytes'] / 1e6:.0f}", f"{found['accuracy']:.3f}")
        body.append([name, peer, f"{found['rounds_per_second']:.3f}", over, *figures])
    return markdown(head, body)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fedsieve.bench.peers", description=(__doc__ or "").partition("\n")[0])
    names = [task.name for task in TASKS]
    parser.add_argument("--jobs", nargs="+", choices=names, default=names, metavar="JOB", help="J1, J2 or J3; default: all")
    known = [peer.name for peer in PEERS]
    text = f"of {', '.join(known)}; default: {', '.join(USUAL)}"
    parser.add_argument("--peers", nargs="+", choices=known, default=list(USUAL), metavar="PEER", help=text)
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each job and peer; default: 3")
    parser.add_argument("--rounds", type=int, help=f"counted rounds, a multiple of {EVERY}; default: 10, 40 and 30")
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="environments; default: .peers")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a run may take; default: 1800")
    text = "file for the figures; default: results/bench_peers.json, for a run of all jobs and usual peers in full"
    parser.add_argument("--out", type=Path, help=text)
    options = parser.parse_args(words)
    if options.repetitions < 1 or (options.rounds is not None and (options.rounds < EVERY or options.rounds % EVERY)):
        parser.error(f"--repetitions is 1 or more, --rounds a multiple of {EVERY}")
    whole = set(names) <= set(options.jobs) and set(USUAL) <= set(options.peers) and options.rounds is None
    options.whole = whole and options.out is None
    if options.whole:
        options.out = Path("results/bench_peers.json")
    return options


def _stop(number: int, frame: object) -> None:
    raise Interrupted(number)


def main(words: Sequence[str] = ()) -> int:
    """Measure, print a table, and keep the figures; 1 if something failed."""
    options = _options(words)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        tasks = [task for task in TASKS if task.name in options.jobs]
        rows = measure(tasks, [peer for peer in PEERS if peer.name in options.peers], options)
    except Interrupted as interrupted:
        return interrupted.exit_code
    except FedsieveError as error:
        print(f"fedsieve: {error}", file=sys.stderr)
        return error.exit_code
    middle = medians(rows)
    found = ratios(middle)
    print("\n" + table(rows))
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f} times the fastest peer, {best(middle)[name]}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        kept = {"ratio": found, "best": best(middle), "rows": rows, **environment()}
        files.replace(options.out, json.dumps(kept, indent=2) + "\n")
    if options.whole and found:
        history.add("peers", found)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
