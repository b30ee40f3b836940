"""Cost of a round against clients, cohort, parameters and density: `python -m fedsieve.bench.scale`, a few minutes.

Fashion-MNIST, 60 examples a client, an MLP of two hidden layers, one local epoch, batch 32, SGD, 2 workers. Where the clients
hold more than there is, they draw their examples (`data.partition = sample`). The cases of an axis differ in one thing, and the
slope is that of log cost against log size: cost ~ size ** slope. First of all the large run of 100,000 clients, 1,000 a round,
stands beside J3 of `fedsieve.bench.rounds`, 1,000 clients, 100 a round, over twenty rounds, and beside a few rounds of
FedSparsify, whose clients keep a state.

Each case is played by a process of its own, which plays a round when it is told to. The cases of an axis take turns, round by
round, so that all see the same machine. Memory is the proportional set size: pages that several processes share are divided
among them (Linux).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from fedsieve import files
from fedsieve.algorithms.base import Job
from fedsieve.algorithms.fedavg import FedAvg
from fedsieve.algorithms.fedsparsify import FedSparsify
from fedsieve.bench import history
from fedsieve.data.batches import federate
from fedsieve.data.datasets import load
from fedsieve.engine.folder import environment
from fedsieve.engine.handle import Plan
from fedsieve.engine.round import play
from fedsieve.engine.transports import Workers
from fedsieve.models.spec import build
from fedsieve.settings import Data, Engine, Local, Model
from fedsieve.streams import Streams

EXAMPLES = 60
"""training examples of a client"""
WARM = 3
"""rounds that are not counted; by then a purge has reached its density"""
COSTS = ("update_ms", "round_seconds", "server_mb", "workers_mb", "bytes_an_update")


@dataclass(frozen=True, slots=True)
class Case:
    """One measured setting; dense FedAvg unless a density is given, FedSparsify with it."""

    clients: int = 100_000
    cohort: int = 100
    width: int = 200
    """units in each hidden layer"""
    density: float | None = None
    rounds: int = WARM + 5


LARGE = Case(cohort=1000, rounds=22)
KEPT = Case(cohort=1000, density=0.1, rounds=WARM + 6)
"""the same with a method whose clients keep a state"""
J3 = Case(clients=1000, rounds=22)
AXES: dict[str, list[Case]] = {
    "clients": [Case(clients=clients) for clients in (1_000, 10_000, 100_000)],
    "cohort": [Case(cohort=cohort) for cohort in (100, 300, 1000)],
    "parameters": [Case(width=width) for width in (50, 200, 800)],
    "density": [Case(density=density) for density in (0.01, 0.1, 1.0)],
}


def serve(case: Case) -> None:
    """Play a round for each line that comes in, and print what it cost."""
    dealt = case.clients * EXAMPLES <= 60_000
    settings = Data(name="fashion-mnist", clients=case.clients, partition="iid" if dealt else "sample", examples=EXAMPLES)
    streams = Streams(0)
    began = perf_counter()
    data = federate(load(settings), settings, streams)
    shared_out = perf_counter() - began
    spec = build(Model(name="mlp", hidden=(case.width, case.width)), data.shape, data.classes)
    algorithm: Any = FedAvg() if case.density is None else FedSparsify(density=case.density, power=30)
    job = Job(spec, spec.initial("glorot", streams), case.rounds, case.clients, streams)
    engine = Engine(rounds=10**6, cohort=case.cohort, eval_every=10**6)
    transport = Workers(Plan(algorithm, spec, data, Local(lr=0.05), case.rounds, 0), 2)
    state = algorithm.init(job)
    print(json.dumps({"parameters": spec.parameters, "data_seconds": shared_out}), flush=True)
    for round, _ in enumerate(sys.stdin, start=1):
        began, transport.states.round = perf_counter(), round
        state, row = play(algorithm, state, round, job, engine, transport)
        transport.states.prune(round)
        said = {"seconds": perf_counter() - began, "bytes": row["bytes_up"] + row["bytes_down"], "density": row["density"]}
        workers = sum(_proportional(process.pid) for process in multiprocessing.active_children())
        print(json.dumps(said | {"server": _proportional(os.getpid()), "workers": workers}), flush=True)
    transport.close()


def measure(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Play cases in turn, round by round; return the costs of each, medians over the rounds that count."""
    with ExitStack() as stack:
        players = [stack.enter_context(_player(case)) for case in cases]
        starts = [json.loads(_line(player)) for player in players]
        played: list[list[dict[str, Any]]] = [[] for _ in cases]
        for _ in range(max(case.rounds for case in cases)):
            for case, player, rounds in zip(cases, players, played, strict=True):
                if len(rounds) < case.rounds and player.stdin:
                    player.stdin.write("\n")
                    player.stdin.flush()
                    rounds.append(json.loads(_line(player)))
    return [_costs(case, start, rounds) for case, start, rounds in zip(cases, starts, played, strict=True)]


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return b of the best fit log(cost) = a + b log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def _costs(case: Case, start: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    counted = rounds[WARM:]
    seconds = median(row["seconds"] for row in counted)
    return {
        **asdict(case),
        "parameters": start["parameters"],
        "data_seconds": start["data_seconds"],
        "update_ms": 1e3 * seconds / case.cohort,
        "round_seconds": seconds,
        "server_mb": max(row["server"] for row in counted) / 1e6,
        "workers_mb": max(row["workers"] for row in counted) / 1e6,
        "bytes_an_update": median(row["bytes"] for row in counted) / case.cohort,
        "memory_mb": [round((row["server"] + row["workers"]) / 1e6, 1) for row in rounds],
        "reached_density": rounds[-1]["density"],
    }


@contextmanager
def _player(case: Case) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "fedsieve.bench.scale", json.dumps(asdict(case))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as player:
        yield player


def _line(player: subprocess.Popen[str]) -> str:
    line = player.stdout.readline() if player.stdout else ""
    if not line:
        raise RuntimeError(f"a case ended with exit code {player.wait()}; its error stands above")
    return line


def _proportional(pid: int | None) -> int:
    """Return the proportional set size of a process in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _show(rows: Sequence[dict[str, Any]], axis: str) -> None:
    print(f"\n{axis:>12} {'ms an update':>13} {'s a round':>10} {'server MB':>10} {'workers MB':>11} {'KB an update':>13}")
    for row in rows:
        print(
            f"{row[axis]:>12} {row['update_ms']:13.2f} {row['round_seconds']:10.2f} {row['server_mb']:10.0f}"
            f" {row['workers_mb']:11.0f} {row['bytes_an_update'] / 1e3:13.1f}",
            flush=True,
        )


def main() -> int:
    """Print the tables, and keep the figures in results/bench_scale.json."""
    if len(sys.argv) > 1:
        serve(Case(**json.loads(sys.argv[1])))
        return 0
    small, large, kept = measure([J3, LARGE, KEPT])
    _show([small, large, kept], "clients")
    ratio = large["update_ms"] / small["update_ms"]
    growth, growth_kept = (row["memory_mb"][-1] / row["memory_mb"][WARM - 1] for row in (large, kept))
    print(
        f"an update of the large run over one of J3: {ratio:.2f} (goal 1.5); its data ready after {large['data_seconds']:.1f} s"
    )
    print(f"memory, last round over round {WARM}: {growth:.3f}, with states {growth_kept:.3f}")
    figures: dict[str, Any] = {"j3": small, "large": large, "kept": kept, "ratio": ratio, "goal": 1.5}
    figures |= {"growth": growth, "growth_kept": growth_kept, "axes": {}}
    for axis, cases in AXES.items():
        rows = measure(cases)
        _show(rows, axis)
        slopes = {cost: slope([row[axis] for row in rows], [row[cost] for row in rows]) for cost in COSTS}
        print("       slope " + "  ".join(f"{cost} {value:.2f}" for cost, value in slopes.items()), flush=True)
        figures["axes"][axis] = {"rows": rows, "slopes": slopes}
    files.replace(Path("results/bench_scale.json"), json.dumps(figures | environment(), indent=2) + "\n")
    ratios = {"J3's update over the large run's": 1 / ratio, "memory at round 3 over the last": 1 / growth}
    history.add("scale", ratios | {"the same with states": 1 / growth_kept})
    return 0


if __name__ == "__main__":
    sys.exit(main())
